"""Adam over factored gradients, the learning-rate schedule, and defaults."""

from flashsae.optim.adam import FactoredAdam as FactoredAdam
from flashsae.optim.schedule import default_lr as default_lr
from flashsae.optim.schedule import learning_rate as learning_rate
from flashsae.optim.schedule import lr_factor as lr_factor
from flashsae.settings.training import ADAM_BETAS as ADAM_BETAS
from flashsae.settings.training import ADAM_EPS as ADAM_EPS
