from .config import GRArguments, GRConfig
from .trainer import GRMixin, GRTrainer
