"""The exceptions that m2mkd_ray raises on purpose.

    M2mkdError                    expected: the message says what to do; exit code 1
    ├── UsageError                a name or a setting that the user typed is wrong; exit code 2
    ├── PlanError                 a plan cannot be carried out; lists every problem at once
    ├── DataError                 images, labels, shards or archives that cannot be read
    ├── FillError                 tensors that do not fit the model they are for
    ├── StoreError                the store cannot be read or written
    │   ├── ArtifactError         an artifact is missing, half-written or fails its hash
    │   └── LockedError           another driver is at work on the same artifacts
    ├── ClusterError              Ray cannot be reached, or has not what the plan asks for
    ├── TrainingError             training cannot go on (a loss that is not finite, a stall)
    ├── PreemptedError            a stage left a node that is being drained; it goes on elsewhere
    └── RunError                  stages failed; lists what is complete, what failed and why

Every message says what was being done, to what, what was found, what was
expected and what to do. Anything else that reaches the command line is our own
defect (exit code 3).
"""


class M2mkdError(Exception):
    """Base of every expected error. Subclasses add no constructor arguments, so all of them pickle."""

    exit_code = 1


class UsageError(M2mkdError):
    """A name or setting that the user typed is wrong."""

    exit_code = 2


class PlanError(M2mkdError):
    """A plan cannot be carried out; the message lists all of its problems."""


class DataError(M2mkdError):
    """Images, labels, shards or archives cannot be read."""


class FillError(M2mkdError):
    """Tensors do not fit the model that they are meant for."""


class StoreError(M2mkdError):
    """The store cannot be read or written."""


class ArtifactError(StoreError):
    """An artifact is missing, half-written or fails its hash."""


class LockedError(StoreError):
    """Another driver is at work on the same artifacts."""


class ClusterError(M2mkdError):
    """Ray cannot be reached, or lacks what the plan asks for."""


class TrainingError(M2mkdError):
    """Training cannot go on."""


class PreemptedError(M2mkdError):
    """A stage left a node that is being drained, with a checkpoint; no failure, as it goes on elsewhere."""


class RunError(M2mkdError):
    """Stages of a run failed."""
