"""The two decoders, libsndfile and FFmpeg, behind one face: an encoded stream → blocks of samples of all its channels.

A stream says by its own structure how many samples are in it, wherever that can be told without decoding. Where the
decoder then gives another number, one of the two is wrong, and that is a reason, never silence.
"""

import ctypes
import io
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO, Literal, cast

import av
import numpy as np
import soundfile
from av.codec.context import CodecContext
from av.stream import Disposition

from pipeline.dataset.mapped_sound import MappedFile, MappedSound
from pipeline.errors import DecodeError

MAX_CHANNELS = 64
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 768_000
MP4 = "mp4"
LIBOPUS = "libopus"
BLOCK_VALUES = 2**21
"""Samples of all channels in one block: 20 s of a 48 kHz stereo file, so that an ordinary clip is one block."""

_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}
"""FFmpeg's sample formats, but for the `p` of those that keep each channel by itself."""
_WIDE_SUBTYPES = frozenset({"PCM_24", "PCM_32", "FLOAT", "DOUBLE"})
_NARROW_FORMATS = frozenset({"u8", "s16"})
_CODECS_OF_THE_CONTAINERS_LAYOUT = ("pcm_", "adpcm_")
"""How the names of codecs begin that don't know themselves which channels there are."""
_OPUS_PRE_SKIP = struct.Struct("<10xH")
"""Where it is in the header that Opus has in every container: RFC 7845, section 5.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """A stream whose decoding has begun."""

    sample_rate_hz: int
    channels: int
    """Of the first samples; some streams go from mono to stereo."""
    bits: Literal[16, 24]
    """How many are worth keeping. The noise of the lossy codecs is far above the 16th."""
    blocks: Iterator[np.ndarray]
    """(samples, channels), float32, full scale is -1 to 1. Raises DecodeError where the stream is damaged, or where it
    ends with another number of samples than are in it."""
    has_video: bool = False


class EncodedStream(ABC):
    """Bytes that one decoder reads from the first to the last: a file, or one of the streams that were joined to it."""

    claimed: int | None = None
    """Samples of a channel that a header promises, where it promises any. Nothing goes by it."""

    @abstractmethod
    def open(self, max_seconds: float | None) -> AbstractContextManager[Decoding]:
        """Begin to decode.

        Args:
            max_seconds: how much will be taken at most, where that is known; blocks may hold more.

        Raises:
            DecodeError: the header can't be read, or there is no decoder for what it names.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPcm:
    """What somebody has to know to read samples without a header."""

    subtype: str
    """libsndfile's word: PCM_16, FLOAT, ULAW …"""
    endian: Literal["LITTLE", "BIG"]
    sample_rate_hz: int
    channels: int
    start: int
    end: int
    """Where the samples lie in the file."""

    def is_read_by(self, file: soundfile.SoundFile) -> bool:
        """Returns whether libsndfile takes the samples for the same; it takes floats in some Wave64 for integers."""
        found = file.subtype, file.samplerate, file.channels
        return found == (self.subtype, self.sample_rate_hz, self.channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class SndfileStream(EncodedStream):
    """A stream for libsndfile."""

    data: bytes
    samples: int | None
    """Of a channel, that are there; None where libsndfile itself goes to the end to see."""
    claimed: int | None = None
    raw: RawPcm | None = None
    """How to read it where libsndfile goes by a header that is wrong about the length, or reads the header wrongly."""

    @contextmanager
    def open(self, max_seconds: float | None) -> Iterator[Decoding]:
        """Begin to decode; without its header, if libsndfile would read anything but what is there."""
        file = self._open_file()
        with file:
            blocks = self._blocks(file, _block_samples(file.samplerate, file.channels, max_seconds))
            bits = 24 if file.subtype in _WIDE_SUBTYPES else 16
            yield Decoding(sample_rate_hz=file.samplerate, channels=file.channels, bits=bits, blocks=blocks)

    def _open_file(self) -> soundfile.SoundFile:
        try:
            file = _ForwardFile(_as_file(self.data))
        except soundfile.SoundFileError as error:
            if self.raw is None:
                raise DecodeError("unreadable header", _message(error)) from error
        else:
            if self.raw is None or (file.frames == self.samples and self.raw.is_read_by(file)):
                return file
            file.close()
        return _open_raw(self.data, self.raw)

    def _blocks(self, file: soundfile.SoundFile, most: int) -> Iterator[np.ndarray]:
        expected = file.frames if self.samples is None else self.samples
        # Not one more: libFLAC would look for it in whatever is behind the frames.
        most, got = max(1, min(most, expected)), 0
        while True:
            try:
                block = file.read(out=np.empty((most, file.channels), np.float32))
            except soundfile.SoundFileError as error:
                raise DecodeError("corrupt stream", f"after {got} samples: {_message(error)}") from error
            if not len(block):
                break
            got += len(block)
            yield block
        if got != expected:
            raise DecodeError("contradictory length", f"{got} samples decode, but {expected} are there")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameStream(EncodedStream):
    """A run of frames that stand for themselves, as of MP3 and of AAC in ADTS, for one of FFmpeg's codecs."""

    data: bytes
    codec: str
    packets: Sequence[tuple[int, int, int]]
    """(first byte, byte behind the last, frames) of each stretch of unbroken frames."""
    skip: int = 0
    """Samples at the beginning that the encoder put before the sound."""
    samples: int | None = None
    """Of a channel, behind those; what the encoder put at the end doesn't count. None is all that decode."""
    claimed: int | None = None

    @contextmanager
    def open(self, max_seconds: float | None) -> Iterator[Decoding]:
        """Begin to decode."""
        context = _codec_context(self.codec)
        yield _begin(self._frames(context), context, max_seconds, self.skip, self.samples)

    def _frames(self, context: Any) -> Iterator[Any]:
        for start, end, frames in self.packets:
            # One packet of many frames: the codec takes one after the other, and Python is out of the way.
            decoded = _decode(context, av.Packet(self.data[start:end]))
            if len(decoded) != frames:
                raise DecodeError("contradictory length", f"{len(decoded)} of {frames} frames at byte {start} decode")
            yield from decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStream(EncodedStream):
    """The best audio stream of a file, for FFmpeg."""

    data: bytes
    demuxer: str
    """FFmpeg's name of it. What a file is has been found out before: FFmpeg knows formats that name other files."""
    least: int = 0
    """Samples of a channel that are there at least."""
    end: int | None = None
    """Samples of a channel behind which the sound ends, within the last packet that is read; None is behind it."""
    ends_early: bool = False
    """The file ends within one of its boxes."""

    @contextmanager
    def open(self, max_seconds: float | None) -> Iterator[Decoding]:
        """Begin to decode."""
        with self._open_container() as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise DecodeError("no audio", f"no stream of the {self.demuxer} file is sound")
            own = stream.codec_context
            if own is None:
                raise DecodeError("unsupported format", f"there is no decoder for the sound of the {self.demuxer} file")
            context = _context_for(own)
            frames, skip = self._frames(container, stream, context), _missing_pre_skip(context, own)
            decoding = _begin(frames, context, max_seconds, skip, None)
            yield replace(
                decoding,
                blocks=self._counted(_window(decoding.blocks, 0, self.end)),
                has_video=any(not video.disposition & Disposition.attached_pic for video in container.streams.video),
            )

    def _open_container(self) -> Any:
        try:
            return av.open(_as_file(self.data), format=self.demuxer)
        except (av.FFmpegError, ValueError) as error:
            raise DecodeError("unreadable header", _message(error)) from error

    def _frames(self, container: Any, stream: Any, context: Any) -> Iterator[Any]:
        packets = got = last = 0
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise DecodeError("cut short", f"the file ends within packet {packets}")
                packets += packet.size > 0
                for frame in _decode(context, packet if packet.size else None):
                    got, last = got + frame.samples, frame.samples
                    yield frame
        except av.FFmpegError as error:
            raise DecodeError("corrupt stream", f"after packet {packets}: {_message(error)}") from error
        if self.demuxer == MP4:
            self._check_index(stream, packets)
        elif self.ends_early:
            raise DecodeError("cut short", "the file ends within one of its blocks")
        if self.end is not None and got - last >= self.end:
            raise DecodeError("contradictory length", f"{got} samples decode, but the end is behind {self.end}")

    def _check_index(self, stream: Any, packets: int) -> None:
        """Compare what was read with the file's index of all packets."""
        index = stream.index_entries
        end = max((entry.pos + entry.size for entry in index), default=0)
        if end > len(self.data) or (self.ends_early and not stream.frames):  # fragments have an index each
            raise DecodeError("cut short", f"{len(self.data)} bytes are there, of at least {end}")
        if packets != len(index):
            raise DecodeError("contradictory length", f"{packets} of the {len(index)} packets in its index are read")

    def _counted(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        got = 0
        for block in blocks:
            got += len(block)
            yield block
        if got < self.least:
            raise DecodeError("contradictory length", f"{got} samples decode, but {self.least} are there")


class _Memory(io.BytesIO):
    """Bytes as a file that never raises: an exception inside libsndfile's callbacks would be printed, not raised."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.tell(), len(self.getbuffer()))[whence]
        return super().seek(min(max(base + offset, 0), len(self.getbuffer())))


def _as_file(data: bytes, start: int = 0, end: int | None = None) -> BinaryIO:
    if isinstance(data, MappedSound):
        return cast("BinaryIO", MappedFile(data, start, end))
    return _Memory(data if start == 0 and end is None else data[start:end])


class _ForwardFile(soundfile.SoundFile):
    """A sound that is read from its beginning on. soundfile would seek to where it is after each read of another file.

    In a compressed stream that costs up to a tenth of all decoding.
    """

    def seekable(self) -> bool:
        return False


def _open_raw(data: bytes, raw: RawPcm) -> soundfile.SoundFile:
    try:
        return _ForwardFile(
            _as_file(data, raw.start, raw.end),
            samplerate=raw.sample_rate_hz,
            channels=raw.channels,
            format="RAW",
            subtype=raw.subtype,
            endian=raw.endian,
        )
    except (soundfile.SoundFileError, ValueError) as error:
        raise DecodeError("unreadable header", _message(error)) from error


def _codec_context(name: str, options: dict[str, str] | None = None) -> Any:
    context: Any = CodecContext.create(name, "r")
    context.thread_count = 1
    context.options = options or {}
    return context


def _context_for(own: Any) -> Any:
    """Returns the decoder for a container's stream: the one that it has, but for what FFmpeg would get wrong."""
    if own.name in ("opus", LIBOPUS):
        # FFmpeg's own decoder is up to 0.4 of full scale away from libopus and some samples late; 16 bits, libopus's
        # default here, would cut off what overshoots.
        context = _codec_context(LIBOPUS, {"request_sample_fmt": "flt"})
        context.extradata, context.sample_rate, context.layout = own.extradata, own.sample_rate, own.layout
        return context
    own.thread_count = 1
    if own.name.startswith(_CODECS_OF_THE_CONTAINERS_LAYOUT):
        own.options = {"ch_layout": f"{_channels_of(own)}C"}
    if own.name == "flac":
        own.options = {"err_detect": "crccheck+explode"}  # the frames' checksums, which it would ignore
    return own


def _channels_of(context: Any) -> int:
    """Returns how many channels a container says that a stream has.

    QuickTime can name the channels in an order of its own. Each of PyAV's objects for such a layout frees memory that
    the context frees, too, and so does each decoded frame's: this one is never freed, and frames get a plain layout.
    """
    layout = context.layout
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return layout.nb_channels


def _missing_pre_skip(context: Any, own: Any) -> int:
    """Returns how much of Opus's pre-skip, in samples, is left in: some WebM files name only a part of it as delay."""
    if context.name != LIBOPUS or len(context.extradata or b"") < _OPUS_PRE_SKIP.size:
        return 0
    return max(0, _OPUS_PRE_SKIP.unpack_from(context.extradata)[0] - int(own.delay))


def _decode(context: Any, packet: Any) -> list[Any]:
    try:
        return context.decode(packet)
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError("corrupt stream", f"{context.name}: {_message(error)}") from error


def _begin(frames: Iterator[Any], context: Any, max_seconds: float | None, skip: int, samples: int | None) -> Decoding:
    """Decode the first frame, which alone says for certain what the stream is: AAC's header may give half the rate.

    Args:
        frames: of FFmpeg's decoder.
        context: that decoder.
        max_seconds: as `EncodedStream.open`.
        skip: samples of a channel to leave out at the beginning.
        samples: how many follow that count; None is all.
    """
    first = next(frames, None)
    if first is None:
        raise DecodeError("no samples")
    rate, channels = first.sample_rate, first.layout.nb_channels
    is_wide = context.codec.lossless and first.format.name.rstrip("p") not in _NARROW_FORMATS
    most = skip + _block_samples(rate, channels, max_seconds)
    blocks = _window(_blocks_of(chain([first], frames), rate, most), skip, samples)
    return Decoding(sample_rate_hz=rate, channels=channels, bits=24 if is_wide else 16, blocks=blocks)


def _blocks_of(frames: Iterator[Any], rate: int, most: int) -> Iterator[np.ndarray]:
    """Put frames together until there are `most` samples, or the channels change."""
    batch: list[Any] = []
    kind, samples = None, 0
    for frame in frames:
        if frame.sample_rate != rate:
            raise several_rates(rate, frame.sample_rate)
        if batch and (samples >= most or (frame.layout.nb_channels, frame.format.name) != kind):
            yield _block(batch, samples)
            batch, samples = [], 0
        kind = frame.layout.nb_channels, frame.format.name
        batch.append(frame)
        samples += frame.samples
    if batch:
        yield _block(batch, samples)


def _block(frames: list[Any], samples: int) -> np.ndarray:
    """Copy frames of one kind into an array: (samples, channels), float32."""
    channels, name = frames[0].layout.nb_channels, frames[0].format.name
    is_planar, dtype = name.endswith("p"), _DTYPES[name.rstrip("p")]
    values = np.empty((samples, channels), dtype, order="F" if is_planar else "C")
    start = 0
    for frame in frames:
        end = start + frame.samples
        if is_planar:
            for channel, plane in zip(
                range(channels), frame.planes, strict=False
            ):  # of 8 and more, PyAV gives one more
                values[start:end, channel] = np.frombuffer(plane, dtype, end - start)
        else:
            interleaved = np.frombuffer(frame.planes[0], dtype, (end - start) * channels)
            values[start:end] = interleaved.reshape(-1, channels)
        start = end
    return _to_float(values)


def _to_float(values: np.ndarray) -> np.ndarray:
    """Bring samples to float32 with a full scale of 1; in unsigned ones the middle is silence."""
    if values.dtype.kind == "f":
        return values.astype(np.float32, copy=False)
    bits = 8 * values.dtype.itemsize
    signed = values.astype(np.float32) - (2 ** (bits - 1) if values.dtype.kind == "u" else 0)
    return signed / np.float32(2 ** (bits - 1))


def _window(blocks: Iterator[np.ndarray], skip: int, samples: int | None) -> Iterator[np.ndarray]:
    """Leave out the first `skip` samples, and what is behind the `samples` that follow them."""
    place = 0
    for block in blocks:
        end = len(block) if samples is None else max(0, skip + samples - place)
        kept = block[max(0, skip - place) : end]
        place += len(block)
        if len(kept):
            yield kept


def _block_samples(sample_rate_hz: int, channels: int, max_seconds: float | None) -> int:
    """Returns how many samples of a channel go into one block."""
    most = BLOCK_VALUES // max(1, channels)
    return most if max_seconds is None else max(1, min(most, math.ceil(max_seconds * sample_rate_hz)))


def checked_rate(sample_rate_hz: int) -> int:
    """Returns the rate, if a sound can have it.

    Raises:
        DecodeError: it can't.
    """
    if not LOWEST_RATE_HZ <= sample_rate_hz <= HIGHEST_RATE_HZ:
        raise DecodeError("implausible sample rate", f"{sample_rate_hz} Hz")
    return sample_rate_hz


def checked_channels(channels: int) -> int:
    """Returns how many channels there are, if a sound can have so many.

    Raises:
        DecodeError: it can't.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise DecodeError("implausible channel count", str(channels))
    return channels


def several_rates(first_hz: int, second_hz: int) -> DecodeError:
    """Returns the reason against a file whose parts play at different rates."""
    return DecodeError("several sample rates", f"{first_hz} and {second_hz} Hz")


def _message(error: Exception) -> str:
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
