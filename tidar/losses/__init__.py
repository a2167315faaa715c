"""Hidden states to losses; sums of losses over micro-batches and ranks."""
