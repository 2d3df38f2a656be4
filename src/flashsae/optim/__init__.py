"""Adam over factored gradients, the learning-rate schedule, and defaults."""

from flashsae.optim.adam import ADAM_BETAS as ADAM_BETAS
from flashsae.optim.adam import ADAM_EPS as ADAM_EPS
from flashsae.optim.adam import FactoredAdam as FactoredAdam
from flashsae.optim.schedule import default_lr as default_lr
from flashsae.optim.schedule import lr_factor as lr_factor
