"""memrewrite: less training memory under torch.compile, by one line of code."""

from memrewrite.api import compile as compile
from memrewrite.api import load_state_dict as load_state_dict
from memrewrite.api import register as register
from memrewrite.api import restore as restore
from memrewrite.api import state_dict as state_dict
from memrewrite.errors import MemrewriteWarning as MemrewriteWarning
from memrewrite.errors import UnsupportedError as UnsupportedError
from memrewrite.gradients.gradient import ProjectedGrad as ProjectedGrad
from memrewrite.inspect.dump import dump as dump
from memrewrite.inspect.report import Report as Report
from memrewrite.inspect.report import report as report
from memrewrite.inspect.saved import SavedTensor as SavedTensor
from memrewrite.inspect.saved import saved_tensors as saved_tensors
from memrewrite.methods.compressor import Compressor as Compressor
from memrewrite.methods.rounded import Rounded as Rounded
from memrewrite.moments.moment import Moment as Moment
from memrewrite.predict.estimate import Estimate as Estimate
from memrewrite.predict.estimate import estimate as estimate
from memrewrite.sites.options import GaLore as GaLore
from memrewrite.sites.options import VeLoRA as VeLoRA
from memrewrite.version import __version__ as __version__
