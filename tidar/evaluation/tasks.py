"""lm-eval's tasks (extra eval)."""

import difflib
import json
from pathlib import Path
from typing import Any

from tidar.config import UserError, first_line
from tidar.config.packages import check_version
from tidar.data import Tokenizer
from tidar.data.tokenizer import FolderTokenizer
from tidar.decoding import Engine

# first version with the interface for models and tasks that is used here
FIRST_LM_EVAL = (0, 4, 13)


def check_lm_eval() -> None:
    """Raises UserError where it is not installed, or too old."""
    check_version("--tasks", "lm-eval", FIRST_LM_EVAL, "eval")


class Tasks:
    """Tasks, groups and tags of lm-eval by name, and the options to run them with."""

    def __init__(
        self,
        names: list[str],
        limit: float | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
        include_path: Path | None = None,
        confirm_run_unsafe_code: bool = False,
    ):
        """limit: examples of each task, or, below 1, a share of them. num_fewshot: None as each task says.

        include_path: folder with further tasks. Raises UserError for a task that lm-eval does not know, and where
        lm-eval is not installed.
        """
        check_lm_eval()
        if include_path and not include_path.is_dir():
            raise UserError(f"--include_path {include_path}: is not a folder")
        self.names, self.limit, self.num_fewshot = names, limit, num_fewshot
        self.apply_chat_template, self.confirm_run_unsafe_code = apply_chat_template, confirm_run_unsafe_code
        self.manager = _manager(include_path, confirm_run_unsafe_code)
        for name in names:
            if name not in self.manager.all_tasks:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them"
                raise UserError(f"--tasks {name}: lm-eval knows no such task; {hint}")

    def checked_tokenizer(self, tokenizer: Tokenizer, model: str) -> FolderTokenizer:
        """Raises UserError for one that the tasks cannot be asked with. model: its name, for messages."""
        if not isinstance(tokenizer, FolderTokenizer):
            raise UserError(f"{model}: holds no tokenizer, which --tasks needs; name one with --tokenizer")
        if self.apply_chat_template and not tokenizer.chat_template:
            raise UserError(f"--apply_chat_template: {tokenizer.name} has no chat template")
        return tokenizer

    def run(
        self, engine: Engine, tokenizer: FolderTokenizer, log_samples: bool = False, **decoding: Any
    ) -> dict[str, Any]:
        """lm-eval's results, with `tokens_per_forward` of each task that decodes, and counts under "decoding".

        decoding: mode, seed and lookup, as of `Engine.stream`.

        Raises UserError for a task whose data cannot be loaded, and for one that executes code or asks for what the
        engine does not have.
        """
        import lm_eval
        from lm_eval.utils import handle_non_serializable

        from tidar.evaluation.lm_eval_model import EngineLM

        model = EngineLM(engine, tokenizer, **decoding)
        results: Any = lm_eval.simple_evaluate(
            model,
            tasks=self.names,
            num_fewshot=self.num_fewshot,
            batch_size=engine.max_batch_size,
            device=str(engine.device),
            limit=self.limit if self.limit is None or self.limit < 1 else int(self.limit),
            log_samples=log_samples,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
            task_manager=self.manager,
            confirm_run_unsafe_code=self.confirm_run_unsafe_code,
        )
        results["config"]["model_args"] = {"model": engine.name, **decoding}
        for task, decoded in model.decoded.items():
            results["results"][task]["tokens_per_forward,none"] = decoded.tokens_per_forward
        results["decoding"] = {task: decoded.report() for task, decoded in model.decoded.items()}
        return json.loads(json.dumps(results, default=handle_non_serializable))


def _manager(include_path: Path | None, confirm_run_unsafe_code: bool) -> Any:
    """lm-eval's TaskManager, with errors of one line."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                loaded = super().load(task_list)
            except Exception as error:  # files and data sets of any kind, read by a library
                raise UserError(f"--tasks: cannot be loaded ({first_line(error)})") from None
            for name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
                    raise UserError(f"--tasks {name}: executes code that the model writes; --confirm_run_unsafe_code")
            return loaded

    try:
        return Manager(include_path=str(include_path) if include_path else None)
    except Exception as error:
        raise UserError(f"--include_path {include_path}: cannot be read ({first_line(error)})") from None


def task_rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: a task's metrics, and its tokens per forward pass. results: of `Tasks.run`."""
    rows = [["task", "metric", "score", "stderr", "tokens/forward"]]
    for task, scores in results["results"].items():
        per_forward = scores.get("tokens_per_forward,none")
        for key, value in scores.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or name == "tokens_per_forward" or not isinstance(value, float):
                continue
            error = scores.get(f"{name}_stderr,{filtered}")
            rows.append(
                [
                    task,
                    name if filtered == "none" else f"{name} ({filtered})",
                    f"{value:.4f}",
                    f"{error:.4f}" if isinstance(error, float) else "",
                    f"{per_forward:.3f}" if per_forward is not None else "",
                ]
            )
    return rows
