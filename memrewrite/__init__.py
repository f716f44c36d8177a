"""memrewrite: training memory under torch.compile, one line."""

from memrewrite.api import compile as compile
from memrewrite.api import load_state_dict as load_state_dict
from memrewrite.api import restore as restore
from memrewrite.api import state_dict as state_dict
from memrewrite.dump import dump as dump
from memrewrite.errors import MemrewriteWarning as MemrewriteWarning
from memrewrite.errors import UnsupportedError as UnsupportedError
from memrewrite.estimate import Estimate as Estimate
from memrewrite.estimate import estimate as estimate
from memrewrite.memory import SavedTensor as SavedTensor
from memrewrite.memory import saved_tensors as saved_tensors
from memrewrite.options import GaLore as GaLore
from memrewrite.options import VeLoRA as VeLoRA
from memrewrite.projected import ProjectedGrad as ProjectedGrad
from memrewrite.report import Report as Report
from memrewrite.report import report as report

__version__ = "0.1.0"
