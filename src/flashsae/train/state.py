"""What changes while training: how it begins, what of it is saved, and how it is put back bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsae import distributed
from flashsae.architecture import Progress, architecture_of
from flashsae.data.acts import only_site
from flashsae.data.shuffle import Batches, OnFill
from flashsae.errors import CheckpointError, ConfigError
from flashsae.files.schema import Positive, parse
from flashsae.metrics import table
from flashsae.neutral import neutral
from flashsae.optim import FactoredAdam
from flashsae.places.finding import load
from flashsae.precision import has_screen, operand_of
from flashsae.sae.centring import center_again, recentered
from flashsae.sae.config import SAEConfig
from flashsae.sae.dead import Bounds, DeadLatents
from flashsae.sae.initial import rows_from_data
from flashsae.sae.losses import fvu_weights
from flashsae.sae.module import SAE
from flashsae.sae.step import join_sites
from flashsae.sae.stored import unsaved_values
from flashsae.settings.kinds import as_json
from flashsae.settings.training import BOTH
from flashsae.train.average import Average, average_of, averaged
from flashsae.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from flashsae.train.config import TrainConfig
from flashsae.train.graph import CapturedSteps
from flashsae.train.init_from import check_start, digest_of, measure_unknown, start_from
from flashsae.train.optimizer import build_optimizer, groups
from flashsae.train.resample import Recent, recent_of, recent_tensors
from flashsae.train.room import Room
from flashsae.train.same_settings import check_settings
from flashsae.train.sample import Sample, measure_sample
from flashsae.train.scaling import Scaling

INIT_TOKENS = 8192
_ADVICE = "Resume with the settings and the data of the run, or start a new one."


@dataclass
class TrainState:
    """Everything that changes while training."""

    sae: SAE
    optimizer: FactoredAdam
    dead: DeadLatents
    batches: Batches
    scaling: Scaling
    """What is done to activations first, so that one learning rate fits the biases whatever the unit of x."""
    variance: float = 1.0
    """Of a token of the initial sample, scaled: what the loss is relative to, for the whole of the training."""
    step: int = 0
    warnings: tuple[str, ...] = ()
    """Sentences about the data, for the user."""
    start: str | None = None
    """Fingerprint of the SAE that the training goes on from."""
    captured: CapturedSteps = field(default_factory=CapturedSteps)
    room: Room | None = None
    """For codes above a threshold, on a GPU; None where the host may wait for their size, or knows it."""
    recent: Recent = field(default_factory=list)
    """Tokens of the last steps, where dead latents are soon to be resampled from them."""
    average: Average = field(default_factory=dict)
    """Of the weights over the last steps, where they are averaged and it has begun."""
    _weights: Tensor | None = None

    @property
    def scale(self) -> float:
        """What activations of one site are multiplied by."""
        return only_site({f"site {number}": site.factor for number, site in enumerate(self.scaling.writes)})

    def loss_weights(self, x: Tensor) -> Tensor:
        """Return the weight of each token of a batch [B, d_in] in the loss; the same tensor while B is the same."""
        if self._weights is None or len(self._weights) != len(x):
            self._weights = fvu_weights(x, self.variance)
        return self._weights

    def current_sae(self) -> SAE:
        """Return the SAE for activations as they come, without the scaling; shares weights with the one in training."""
        return self.scaling.folded(self.sae).eval()

    def finished_sae(self) -> SAE:
        """Return the SAE for activations as they come. Where weights are split, with whole ones, on the CPU.

        What it shares with the SAE in training is changed by an architecture that finishes in place: for the end only.
        """
        sae, units = self.current_sae(), self.scaling.units
        sae.set_progress(Progress.end())
        means = averaged(self)
        for row in sae.architecture.parameters:
            if row.name in means:
                setattr(sae, row.name, nn.Parameter(units.fold(row, means[row.name])))
            elif row.trained and self.optimizer.is_split(getattr(self.sae, row.name)):
                whole = self.optimizer.float32_weights(getattr(self.sae, row.name))
                setattr(sae, row.name, nn.Parameter(units.fold(row, whole)))
        sae = recentered(sae, None) if sae.centres else sae
        for name, value in unsaved_values(sae.config, sae.b_dec.dtype, sae.b_dec.device).items():
            setattr(sae, name, value)
        sae.precision = None
        sae = sae.to(sae.W_dec.device)
        if sae.architecture.finish is not None:
            with torch.no_grad():
                sae.architecture.finish(sae)
        return sae


@neutral()
def init_state(
    config: TrainConfig,
    batches: Batches,
    device: torch.device,
    checkpoints: Path | None = None,
    on_fill: OnFill | None = None,
    start: SAE | None = None,
) -> TrainState:
    """Return the state to start from.

    Args:
        config: settings.
        batches: of activations.
        device: for the SAE.
        checkpoints: folder whose newest checkpoint is resumed, if it holds one. Otherwise, and for None, the start: as
            the architecture initialises its parameters from some tokens.
        on_fill: hears of it if a shuffle buffer is filled at the start.
        start: an SAE to go on from, in the place of `config.init_from`.
    Raises:
        DataError: the activations do not vary, or are too large or too small for float32.
        ConfigError: the SAE to go on from is another one.
        CheckpointError: the newest checkpoint is damaged, foreign, or of other data. It is not passed over silently.
    """
    if start is not None and config.init_from is not None:
        raise ConfigError(f"init_from: expected one SAE to go on from, got one beside that in {config.init_from}.")
    table(architecture_of(config.arch).terms)  # refuses a term with the name of a metric
    found = [] if checkpoints is None else list_checkpoints(checkpoints)
    sae = SAE(SAEConfig.of(config), seed=config.seed).to(device)
    sae.precision = config.precision
    sae.set_progress(progress_at(0, config))
    scaling, variance = Scaling.uniform(1.0, config.d_in, config.d_out), 1.0
    warnings: tuple[str, ...] = ()
    if not found:
        batch = batches.sample(INIT_TOKENS, on_fill)
        batch = {site: acts.to(device, torch.float64) for site, acts in batch.items()}
        sample = measure_sample(batch, sae.architecture, config.normalize_activations)
        scaling, variance, warnings = sample.scaling, distributed.averaged(sample.variance), sample.warnings
        start = load(config.init_from) if config.init_from is not None else start
        _begin(sae, config, sample, batches, start)
    dead = DeadLatents(config.d_sae, config.dead_after_tokens, device)
    state = TrainState(sae, build_optimizer(sae, config), dead, batches, scaling, variance, warnings=warnings)
    state.room, state.start = room_of(sae, device), None if start is None else digest_of(start)
    if found:
        checkpoint = load_checkpoint(found[-1])
        check_settings(config, checkpoint)
        restore(state, checkpoint, knows_start=config.init_from is None)
        state.average = average_of(sae, state.step, config, part_of(checkpoint, "average."))
    return state


def _begin(sae: SAE, config: TrainConfig, sample: Sample, batches: Batches, start: SAE | None) -> None:
    """Let the parameters be those of another SAE, or begin with some tokens."""
    if start is not None:
        if config.init == "data":
            raise ConfigError(BOTH)
        check_start(config, start.config)
        start_from(sae, start, sample.scaling)
        measure_unknown(sae, start, sample)
        center_again(sae, sample.x)
        return
    if config.init == "data":
        tokens = batches.sample(config.d_sae)  # one for each latent, if there are so many
        tokens = {site: acts.to(sample.x.device) for site, acts in tokens.items()}
        rows_from_data(sae, *sample.scaling(*join_sites(sae.architecture, tokens)))
    sae.initialize_from(sample.x, sample.target)


def progress_at(step: int, config: TrainConfig) -> Progress:
    """Return how far a training is at a step; an extension is behind the end of all that was scheduled."""
    begin, end = config.stage(step)
    return Progress(step, step if begin else end, config.seed)


def room_of(sae: SAE, device: torch.device) -> Room | None:
    """Return the room that codes of a training begin with, where there is to be any."""
    return Room() if sae.architecture.varies and device.type == "cuda" else None


def _moments(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return the state of the optimiser, by name of the parameter."""
    names = [name for names in groups(state.sae).values() for name in names]
    return {names[number]: moments for number, moments in state.optimizer.state_dict()["state"].items()}


def to_checkpoint(state: TrainState, config: TrainConfig) -> Checkpoint:
    """Return everything of the state that must survive a kill."""
    place, data = state.batches.state()
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.state_dict().items()}
    for parameter, moments in _moments(state).items():
        tensors |= {f"adam.{parameter}.{name}": tensor for name, tensor in moments.items()}
    state.dead.finish_reading()
    bounds = None if state.dead.bounds is None else asdict(state.dead.bounds)
    tensors["dead.tokens_since_fired"] = state.dead.tokens_since_fired
    tensors["rng.torch"] = torch.get_rng_state()
    tensors |= {f"data.{name}": tensor for name, tensor in data.items()}
    tensors |= {f"recent.{name}": tensor for name, tensor in recent_tensors(state.recent).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
    return Checkpoint(
        state.step,
        {
            "data": place,
            "scaling": asdict(state.scaling),
            "start": state.start,
            "variance": state.variance,
            "config": as_json(config.flat()),
            "dead_bounds": bounds,
            "room": None if state.room is None else asdict(state.room),
            "screens": has_screen(state.sae.precision),
        },
        tensors,
    )


@dataclass(frozen=True)
class _Saved:
    """The part of a checkpoint that JSON holds."""

    data: dict[str, Any]
    variance: Positive
    config: dict[str, Any]
    dead_bounds: Bounds | None
    room: Room | None = None
    scaling: Scaling | None = None
    scale: Positive | None = None
    """What version 4 wrote in the place of `scaling`."""
    start: str | None = None
    screens: bool = True
    """Whether the precision of the SAE has a screen, if that of the settings has one."""


def restore(state: TrainState, checkpoint: Checkpoint, *, knows_start: bool = True) -> None:
    """Put a fresh state where the checkpoint was taken.

    Args:
        state: changed in place.
        checkpoint: of a training with the same settings.
        knows_start: whether the SAE that it goes on from is known, and not only by the name of its folder.
    Raises:
        CheckpointError: the checkpoint is of other sizes or of other data.
    """
    where = f"the checkpoint of step {checkpoint.step}"
    saved = parse(_Saved, checkpoint.state, where, _ADVICE)
    if knows_start and state.start != saved.start:
        raise CheckpointError(f"{where} is of a training that went on from another SAE. {_ADVICE}")
    state.batches.restore((saved.data, part_of(checkpoint, "data.")))
    if has_screen(state.sae.precision) and not saved.screens:
        state.sae.precision = operand_of(str(state.sae.precision))
    newer = {row.name for row in state.sae.architecture.parameters if not row.saved}  # than some checkpoints
    for name, parameter in state.sae.state_dict().items():
        if name not in newer or f"sae.{name}" in checkpoint.tensors:
            parameter.copy_(_tensor(checkpoint, f"sae.{name}", parameter))
    state.sae.centres = hasattr(state.sae, "x_mean") and bool(state.sae.x_mean.any())
    adam = state.optimizer.state_dict()
    adam["state"] = {
        number: {name: _tensor(checkpoint, f"adam.{parameter}.{name}", moment) for name, moment in moments.items()}
        for number, (parameter, moments) in enumerate(_moments(state).items())
    }
    state.optimizer.load_state_dict(adam)
    since = state.dead.tokens_since_fired
    since.copy_(_tensor(checkpoint, "dead.tokens_since_fired", since))
    state.dead.bounds = saved.dead_bounds
    if state.room is not None and saved.room is not None:
        state.room = saved.room
    torch.set_rng_state(_tensor(checkpoint, "rng.torch", torch.get_rng_state()))
    if saved.scaling is None:
        config = state.sae.config
        state.scaling = Scaling.uniform(saved.scale or 1.0, config.d_in, config.d_out)
    else:
        state.scaling = saved.scaling
    state.recent = recent_of(part_of(checkpoint, "recent."), since.device)
    state.variance, state.start = saved.variance, saved.start
    state.step = checkpoint.step


def part_of(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint whose names begin so, by the rest of their names."""
    tensors = checkpoint.tensors.items()
    return {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}


def _tensor(checkpoint: Checkpoint, name: str, like: object) -> Tensor:
    """Return a tensor of a checkpoint; raise CheckpointError unless it is as the one that it takes the place of."""
    saved = checkpoint.tensors.get(name)
    fits = saved is not None and (
        not isinstance(like, Tensor) or (saved.shape == like.shape and saved.dtype == like.dtype)
    )
    if saved is None or not fits:
        got = "nothing" if saved is None else f"{list(saved.shape)}, {saved.dtype}"
        wanted = f"of the shape {list(like.shape)}, {like.dtype}" if isinstance(like, Tensor) else "there"
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit these settings: expected {name} {wanted}, got "
            f"{got}. {_ADVICE}"
        )
    return saved
