"""Several teachers asked about the same clips, and their answers made one."""

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from teacher.audio_transformer import AudioTransformer
from teacher.front_ends import FrontEnd
from teacher.inference import optimise_for_inference

logger = logging.getLogger(__name__)


class Ensemble(nn.Module):
    """Asks several teachers about the same clips, and does once what they have in common.

    Members whose front ends have equal configurations share one spectrogram. A batch that is too large for a GPU's
    memory is asked in halves from then on. What a clip is told does not depend on its neighbours, so neither the
    batch size nor such a split changes more than rounding errors.

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
        largest_batch: clips that are asked about at once; None is all that are given.
    """

    def __init__(
        self, members: Iterable[nn.Module], weights: Sequence[float], precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.precision = precision
        self.members = nn.ModuleList()
        for member in members:
            member.requires_grad_(False).eval()
            if isinstance(member, AudioTransformer):
                optimise_for_inference(member, precision)
            self.members.append(member)
        if not self.members:
            raise ValueError("an ensemble needs at least one teacher")
        _check_weights(weights, len(self.members))
        self.sample_rates_hz: list[int] = sorted({_rate(member) for member in self.members})
        self.input_seconds: float = max(_seconds(member) for member in self.members)
        self.largest_batch: int | None = None

    @torch.inference_mode()
    def forward(self, waveforms: Mapping[int, Tensor], edge_shifts_hz: Tensor | None = None) -> Tensor:
        """Returns the logits of all members.

        Args:
            waveforms: sample rate in Hz → (batch, samples), float32, -1 to 1: the same clips at each of
                `sample_rates_hz`.
            edge_shifts_hz: (batch, 2), on the CPU: how far each clip's lower and upper band edges are moved for the
                members whose front end can do it; None leaves them.

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
        start = 0
        while start < clips or not pieces:
            size = min(clips - start, self.largest_batch or clips)
            piece = {rate: waveforms[rate][start : start + size] for rate in self.sample_rates_hz}
            shifts = None if edge_shifts_hz is None else edge_shifts_hz[start : start + size]
            try:
                pieces.append(self._ask(piece, shifts))
            except torch.OutOfMemoryError as error:
                if size <= 1:
                    raise
                reason = str(error).splitlines()[0]
                self.largest_batch = size // 2
                logger.warning(
                    "%d clips at once are too many for the memory (%s); going on with %d", size, reason, size // 2
                )
                continue
            start += size
        return torch.cat(pieces, dim=1)

    def mean(self, logits: Tensor) -> Tensor:
        """Returns the weighted mean of the members' logits: (teachers, batch, classes) → (batch, classes), float32."""
        return ensemble_logits(logits.unbind(), self.weights)

    def _ask(self, waveforms: Mapping[int, Tensor], edge_shifts_hz: Tensor | None) -> Tensor:
        features: dict[Hashable, Tensor] = {}
        logits = []
        for member in self.members:
            key = _features_key(member)
            if key not in features:
                samples = round(_seconds(member) * _rate(member))
                front_end = member.get_submodule("front_end")
                moved = {"edge_shifts_hz": edge_shifts_hz} if isinstance(front_end, FrontEnd) else {}
                features[key] = front_end(waveforms[_rate(member)][:, :samples], **moved)
            logits.append(self._network(member, features[key]))  # (batch, classes)
        _check_shapes(logits)
        return torch.stack(logits)

    def _network(self, member: nn.Module, features: Tensor) -> Tensor:
        lower = self.precision != torch.float32 and not isinstance(member, AudioTransformer)
        with torch.autocast(features.device.type, self.precision if lower else None, enabled=lower):
            return member(features).float()


def _rate(member: nn.Module) -> int:
    return cast("int", member.sample_rate_hz)


def _seconds(member: nn.Module) -> float:
    return cast("float", member.input_seconds)


def _features_key(member: nn.Module) -> Hashable:
    """Two members with equal keys take the same features."""
    front_end = member.get_submodule("front_end")
    # Only of our own is it known that the configuration says everything.
    made_by = front_end.config if isinstance(front_end, FrontEnd) else id(front_end)
    return made_by, _rate(member), _seconds(member)


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
    normalized = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)  # (teachers,)
    stacked = torch.stack([tensor.float() for tensor in logits])  # (teachers, batch, classes)
    return torch.tensordot(normalized.to(stacked), stacked, dims=1)


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
