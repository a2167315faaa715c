"""What a run will need, from its plan: memory at the peak of a step, its time, and shapes that fit."""
