"""Where else metrics may go: TensorBoard, W&B, MLflow; each an optional extra, checked when it is made.

A recipe names one as its `metric_logger` component and makes it before it loads any data, so that a missing package
stops the run at once. Each sends numbers and nothing else: no source, no environment, no rows.
"""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torchmask.errors import EnvironmentFault


class MetricLogger(Protocol):
    """Anything that takes the metrics of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one step's numbers; they may be NaN or infinite."""

    def close(self) -> None:
        """Send what is buffered."""


class TensorBoardLogger:
    """Event files for TensorBoard.

    Args:
        log_dir: folder for the event files, `${output_dir}/tensorboard` for example.

    Raises:
        EnvironmentFault: R16 when tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path) -> None:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Write the last events."""
        self._writer.close()


class WandBLogger:
    """A run on Weights & Biases.

    Args:
        project: created if it is not there.
        entity: user or team; None for the default of the account.
        group: runs of one group are shown together.
        name: of this run; None lets the service choose.
        mode: `online`, `offline` (kept in `log_dir`, sent by `wandb sync`) or None for what the environment says.
        log_dir: folder for wandb's own files; None for the working directory.
        run_id: goes on with this run instead of starting one.

    Raises:
        EnvironmentFault: R16 when wandb is not installed or does not let the run start.
    """

    def __init__(
        self,
        project: str = "torchmask",
        *,
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        log_dir: str | None = None,
        run_id: str | None = None,
    ) -> None:
        wandb = _require("wandb")
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                group=group,
                name=name,
                mode=mode,
                dir=log_dir,
                id=run_id,
                resume="allow" if run_id else None,
                save_code=False,
            )
        except Exception as error:  # wandb has no common base class for its errors
            raise EnvironmentFault(
                "R16",
                f"W&B did not start the run: {type(error).__name__}: {error}",
                where="metric_logger",
                fix="log in with `wandb login`, or set metric_logger.mode=offline and send the run later",
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflowLogger:
    """A run in an MLflow experiment.

    Args:
        experiment: created if it is not there.
        tracking_uri: server or folder; None for what the environment says.
        run_name: None lets MLflow choose.

    Raises:
        EnvironmentFault: R16 when mlflow is not installed or its server does not answer.
    """

    def __init__(
        self, experiment: str = "torchmask", *, tracking_uri: str | None = None, run_name: str | None = None
    ) -> None:
        self._mlflow: Any = _require("mlflow")
        try:
            if tracking_uri is not None:
                self._mlflow.set_tracking_uri(tracking_uri)
            self._mlflow.set_experiment(experiment)
            self._mlflow.start_run(run_name=run_name)
        except Exception as error:
            raise EnvironmentFault(
                "R16",
                f"MLflow did not start the run: {type(error).__name__}: {error}",
                where="metric_logger",
                fix="check metric_logger.tracking_uri, a folder or the address of a server",
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step's finite values (MLflow's stores refuse the others)."""
        self._mlflow.log_metrics({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def _require(package: str) -> ModuleType:
    """Import an optional package; its name is that of torchmask's extra."""
    if importlib.util.find_spec(package) is None:
        raise EnvironmentFault(
            "R16",
            f"{package} is not installed",
            where="metric_logger",
            fix=f'pip install "torchmask[{package}]", or take metric_logger out of the configuration',
        )
    return importlib.import_module(package)
