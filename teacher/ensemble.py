"""An ensemble of teachers: the logits of each for the same clips, and their weighted mean."""

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from teacher.audio_transformer import AudioTransformer
from teacher.compiled_blocks import compile_blocks
from teacher.feature_groups import FeatureGroup, clip_seconds, extract_features, input_seconds, logits_of_groups
from teacher.front_ends import FrontEnd
from teacher.inference import optimise_for_inference

_LONG_SECONDS = 11.0
"""Of a clip that is no ordinary one, with room for what encoders add to ten seconds."""

logger = logging.getLogger(__name__)


class Ensemble(nn.Module):
    """Runs several teachers on the same clips, and computes once what they have in common.

    Members whose front ends differ in what `finish` does alone share one spectrogram. A batch that is too large for a
    GPU's memory is halved from then on. A clip's logits do not depend on its neighbours, so neither the batch size nor
    such a split changes more than rounding errors.

    Args:
        members: each takes what its `.front_end` makes of (batch, samples) float32 waveforms at its `.sample_rate_hz`,
            at most `.input_seconds` long, and gives (batch, classes) logits. They are on their device already and
            belong to the ensemble from then on, which freezes them and exchanges the layers of our own families for
            faster ones (`teacher.inference`). An iterator that loads them one by one saves memory.
        weights: one number above 0 a member, for `mean`.
        precision: of the matrix products in our families' blocks; other modules run under autocast. Front ends compute
            in float32 whatever is chosen.

    Raises:
        ValueError: there is no member, or a weight is not a positive number.

    Attributes:
        sample_rates_hz: the rates of the waveforms that the members want, ascending.
        input_seconds: the longest clip that a member looks at as a whole; others get its beginning.
        clip_seconds: how much of a clip a member can make use of; infinite where one hears clips to their end.
        largest_batch: clips of a forward pass; None is all that are given.
    """

    def __init__(
        self,
        members: Iterable[nn.Module],
        weights: Sequence[float],
        precision: torch.dtype = torch.float32,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.precision = precision
        self.members = nn.ModuleList()
        for member in members:
            member.requires_grad_(False).eval()
            if isinstance(member, AudioTransformer):
                optimise_for_inference(member, precision, packed=not compiled)
                if compiled:
                    compile_blocks(member, precision)
            self.members.append(member)
        if not self.members:
            raise ValueError("an ensemble needs at least one teacher")
        _check_weights(weights, len(self.members))
        self.sample_rates_hz: list[int] = sorted({_rate(member) for member in self.members})
        self.input_seconds: float = max(input_seconds(member) for member in self.members)
        self.clip_seconds: float = max(clip_seconds(member) for member in self.members)
        self.largest_batch: int | None = None
        self._shares: Tensor | None = None

    @torch.inference_mode()
    def forward(
        self,
        waveforms: Mapping[int, Tensor],
        edge_shifts_hz: Tensor | None = None,
        lengths: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Returns the logits of all members.

        Args:
            waveforms: sample rate in Hz → (batch, samples), float32, -1 to 1: the same clips at each of
                `sample_rates_hz`.
            edge_shifts_hz: (batch, 2), on the CPU: how far each clip's lower and upper band edges are moved for the
                members whose front end can do it; None leaves them.
            lengths: sample rate in Hz → (batch,), int64, on the CPU: the samples of each row that are the clip; zeros
                follow. Each member then takes a clip as its original does: our families by their front ends, others
                with silence or a cut to their `.input_seconds`, or where that is infinite as long as it is. None: all
                rows are heard as they are, but for what is beyond a member's `.input_seconds`.

        Returns:
            (teachers, batch, classes), float32, before the sigmoid.

        Raises:
            ValueError: a rate is missing, the batches differ in size, or the members in their classes.
            torch.OutOfMemoryError: the memory does not suffice even for a single clip.
        """
        if missing := [rate for rate in self.sample_rates_hz if rate not in waveforms]:
            raise ValueError(f"no waveforms at {missing[0]} Hz; give them at each of {self.sample_rates_hz} Hz")
        sizes = {rate: len(waveforms[rate]) for rate in self.sample_rates_hz}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the batches differ in size: {sizes}; give the same clips at each rate")
        clips = sizes[self.sample_rates_hz[0]]
        pieces: list[Tensor] = []  # (teachers, at most largest_batch, classes) each
        is_long = any(waveforms[rate].shape[1] > _LONG_SECONDS * rate for rate in self.sample_rates_hz)
        start, largest = 0, self.largest_batch or clips
        while start < clips or not pieces:
            size = min(clips - start, largest)
            some = slice(start, start + size)
            piece = {rate: waveforms[rate][some] for rate in self.sample_rates_hz}
            shifts = None if edge_shifts_hz is None else edge_shifts_hz[some]
            its_lengths = None if lengths is None else {rate: lengths[rate][some] for rate in self.sample_rates_hz}
            try:
                pieces.append(self._ask(piece, shifts, its_lengths))
            except torch.OutOfMemoryError as error:
                if size <= 1:
                    raise
                reason = str(error).splitlines()[0]
                largest = size // 2
                if not is_long:  # what a few long clips need says nothing of the others
                    self.largest_batch = largest
                logger.warning(
                    "%d clips at once are too many for the memory (%s); going on with %d", size, reason, size // 2
                )
                continue
            start += size
        return torch.cat(pieces, dim=1)

    def mean(self, logits: Tensor) -> Tensor:
        """Returns the weighted mean of the members' logits: (teachers, batch, classes) → (batch, classes), float32."""
        if self._shares is None or self._shares.device != logits.device:  # copied once, not with every batch
            self._shares = normalised_weights(self.weights).to(logits)  # (teachers,)
        return torch.tensordot(self._shares, logits.float(), dims=1)

    def _ask(
        self, waveforms: Mapping[int, Tensor], edge_shifts_hz: Tensor | None, lengths: Mapping[int, Tensor] | None
    ) -> Tensor:
        groups: dict[Hashable, list[FeatureGroup]] = {}
        logits = []
        for member in self.members:
            key, rate = _features_key(member), _rate(member)
            if key not in groups:
                its_lengths = None if lengths is None else lengths[rate]
                groups[key] = extract_features(member, waveforms[rate], edge_shifts_hz, its_lengths)
            logits.append(logits_of_groups(groups[key], partial(self._network, member)))  # (batch, classes)
        _check_shapes(logits)
        return torch.stack(logits)

    def _network(self, member: nn.Module, group: FeatureGroup) -> Tensor:
        if isinstance(member, AudioTransformer):
            own = {} if group.frames is None else {"frames": group.frames}
            return member(member.front_end.finish(cast("Tensor", group.features)), **own).float()
        lower = self.precision != torch.float32
        with torch.autocast(group.device.type, self.precision if lower else None, enabled=lower):
            return member(group.features).float()


def _rate(member: nn.Module) -> int:
    return cast("int", member.sample_rate_hz)


def _features_key(member: nn.Module) -> Hashable:
    """Two members with equal keys share a spectrogram."""
    front_end = member.get_submodule("front_end")
    # Only of our own is it known that the configuration says everything.
    made_by = front_end.spectrogram_config if isinstance(front_end, FrontEnd) else id(front_end)
    return made_by, _rate(member), input_seconds(member)


def ensemble_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average the logits of several teachers.

    Args:
        logits: one (batch, classes) tensor a teacher, before the sigmoid.
        weights: one number above 0 a teacher; only their ratios count.

    Returns:
        (batch, classes), float32: the weighted mean.

    Raises:
        ValueError: there is no teacher, the shapes disagree, or a weight is not a positive number.
    """
    if not logits:
        raise ValueError("an ensemble needs at least one teacher")
    _check_weights(weights, len(logits))
    _check_shapes(logits)
    stacked = torch.stack([tensor.float() for tensor in logits])  # (teachers, batch, classes)
    return torch.tensordot(normalised_weights(weights).to(stacked), stacked, dims=1)


def normalised_weights(weights: Sequence[float]) -> Tensor:
    """Returns the weights' shares of their sum, (teachers,) float64."""
    return torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)


def _check_weights(weights: Sequence[float], teachers: int) -> None:
    if len(weights) != teachers:
        raise ValueError(f"{teachers} teachers, but {len(weights)} weights; give one weight for each teacher")
    for place, weight in enumerate(weights, start=1):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"teacher {place} has weight {weight}; choose a number above 0")


def _check_shapes(logits: Sequence[Tensor]) -> None:
    for place, tensor in enumerate(logits, start=1):
        if tensor.shape != logits[0].shape:
            raise ValueError(
                f"teacher {place} gives logits of shape {tuple(tensor.shape)}, the first one {tuple(logits[0].shape)}; "
                f"all teachers of an ensemble need the same classes"
            )
