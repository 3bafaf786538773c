r"""What each unit costs at each width, measured: proxy losses, and the effect on the output.

For every unit its relative proxy loss :math:`e(b)` is measured at every width b that it may have,
and once, with the unit alone rounded to `PROBE_BITS`, the Kullback-Leibler divergence D of the
model's next-token distribution to the dense model's. What the unit costs at b bits is taken as
:math:`D \, e(b) / e(\text{PROBE\_BITS})`, and what a model costs as the sum over its units: the
divergence is a quadratic form of small errors, and those of different layers hardly correlate.

Source: Malinovskii et al., "Pushing the limits of large language model quantization via the
linearity theorem" (2411.17525), with the divergence measured of rounded layers in place of noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rlo_core.errors import RLOError
from rlo_core.files import write_json
from torch import Tensor, nn

from rlo_gptq.allocation.units import EMBEDDING, HEAD, Unit, Units
from rlo_gptq.calibration.block_inputs import Activations, BlockCall, run_sequences
from rlo_gptq.calibration.dense_pass import dense_outputs, first_inputs
from rlo_gptq.calibration.hessians import collect_hessians, input_groups
from rlo_gptq.calibration.passes import linear_of, stages
from rlo_gptq.calibration.token_weights import logits_from_hidden
from rlo_gptq.models.fold_checkpoint import FoldedHead
from rlo_gptq.models.layout import split_all_experts
from rlo_gptq.models.source import release, require_filled
from rlo_gptq.options import layer_seed
from rlo_gptq.packed.tied_head import TiedHead
from rlo_gptq.pipeline.outside import OutsideQuantizer
from rlo_gptq.pipeline.processes import Processes
from rlo_gptq.pipeline.work_folder import WorkFolder
from rlo_gptq.rounding.layer import quantize_layer
from rlo_gptq.settings import LayerSettings
from rlo_gptq.tuning.divergence import Target, divergence, known_part

PROBE_BITS = 3
"""Wide enough that the divergence is about proportional to the error, narrow enough to be seen."""
_LENGTH = 256  # tokens of a probe's sequence
_HESSIAN_TOKENS = 8192
_TOP = 256  # tokens of the dense distribution that are told apart; the others are one event


class ProbeError(RLOError):
    """Probes of other settings."""


@dataclass
class Probes:
    """What was measured of a model's units, and the file that keeps it.

    Args:
        path: Of the file.
        decisions: Everything that decides the numbers, as plain JSON values.
        units: By their names: proxy losses by bits, and the divergence at `probe_bits`.
    """

    path: Path
    decisions: dict[str, Any]
    units: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, decisions: Mapping[str, Any]) -> Probes:
        """Return what is in the file already; it may not be there.

        Raises:
            ProbeError: it was measured with other settings, or is no such file.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(decisions))
        if not path.is_file():
            return cls(path, wanted)
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            before, units = dict(found["decisions"]), dict(found["units"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeError(f"{str(path)!r} holds no probes; delete it") from error
        changed = sorted(
            name for name in {*before, *wanted} if before.get(name) != wanted.get(name)
        )
        if changed:
            raise ProbeError(
                f"{str(path)!r} was measured with other settings ({', '.join(changed)}); choose "
                "another --save, or delete it"
            )
        return cls(path, wanted, units)

    def add(self, unit: str, measured: dict[str, Any]) -> None:
        """Keep what was measured of a unit, on disk too."""
        self.units[unit] = measured
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"decisions": self.decisions, "units": self.units})

    def lacks(self, unit: Unit) -> bool:
        """Whether a unit was not measured at all bits that it may have."""
        found = self.units.get(unit.name)
        if found is None or found["probe_bits"] != probe_bits(unit):
            return True
        return any(bits < 16 and str(bits) not in found["proxy"] for bits in unit.bytes)

    def loss(self, unit: str, bits: int) -> float:
        """Return the predicted divergence of a unit at some bits, in nats."""
        found = self.units[unit]
        proxies: dict[str, float] = found["proxy"]
        if bits >= 16 or not proxies:
            return 0.0
        reference = proxies[str(found["probe_bits"])]
        if reference <= 0:
            return 0.0
        return float(found["kl"]) * proxies[str(bits)] / reference


@dataclass
class Prober:
    """Measures the units of one model, block by block.

    Args:
        units: What is measured.
        folded: Of a model whose rotations are folded and whose head was tied.
        probes: Where it is kept; what is there is not measured again.
        sequences: Calibration sequences, (count, tokens).
        tokens: Over which divergences are averaged.
        note: Is told of every block: its number, how many there are, and what is done.
    """

    units: Units
    folded: FoldedHead | None
    probes: Probes
    sequences: Tensor
    tokens: int
    note: Callable[[int, int, str], None]

    def __post_init__(self) -> None:
        self.source, self.layout = self.units.source, self.units.layout
        self.options = self.units.options
        length = min(_LENGTH, self.sequences.shape[1])
        pieces = self.sequences[:, : self.sequences.shape[1] // length * length]
        self.pieces = pieces.reshape(-1, length)[: max(1, self.tokens // length)]
        rows = max(1, -(-_HESSIAN_TOKENS // self.sequences.shape[1]))
        self.calibrating = self.sequences[:rows]

    @torch.no_grad()
    def run(self) -> None:
        """Measure what is not measured yet."""
        begun = [unit for unit in self.units.units if self.probes.lacks(unit)]
        if not begun:
            return
        targets = self._targets()
        rows, pieces = range(len(self.calibrating)), range(len(self.pieces))
        inputs, calls = first_inputs(
            self.source, self.layout, self.calibrating, rows, offload=self._offload
        )
        states, own_calls = first_inputs(self.source, self.layout, self.pieces, pieces)
        try:
            for index in range(self.layout.count):
                name = self.layout.block_name(index)
                here = [u for u in begun if u.name.startswith(f"{name}.")]
                self.note(index, self.layout.count, "probe" if here else "replay")
                block = self._block(index)
                variants: list[Tensor] = []
                measured: list[dict[str, Any]] = []
                begin = time.perf_counter()
                if here:
                    variants, measured = self._of_block(
                        block, name, here, calls[index], inputs, own_calls[index], states
                    )
                run_sequences(block, calls[index], inputs, inputs, len(rows))
                run_sequences(block, own_calls[index], states, states, len(pieces))
                release(block)
                self._through(variants, own_calls, index + 1)
                found = self._divergences(variants, targets)
                seconds = round((time.perf_counter() - begin) / max(1, len(here)), 3)
                for unit, record, kl in zip(here, measured, found, strict=True):
                    self.probes.add(unit.name, {**record, "kl": kl, "seconds": seconds})
            for unit in begun:
                if not unit.layers:
                    self.note(self.layout.count - 1, self.layout.count, f"probe {unit.name}")
                    self._of_outside(unit, inputs, states, own_calls, targets)
        finally:
            inputs.close()
            states.close()

    @property
    def _offload(self) -> Path | None:
        return self.probes.path.parent if self.options.offload else None

    def _block(self, index: int) -> nn.Module:
        block = self.source.load_module(self.layout.block_name(index))
        if self.layout.experts:
            split_all_experts(block)
        return block

    def _targets(self) -> list[Target]:
        """Return the dense model's distributions over the probe's tokens."""
        found = []
        with dense_outputs(
            self.source,
            self.layout,
            self.pieces,
            range(len(self.pieces)),
            note=lambda index, count: self.note(index, count, "dense model"),
        ) as (hidden, logits_of):
            for row, ids in enumerate(self.pieces):
                logits = logits_of(hidden.get(row, self.source.device))[0]
                following = torch.cat([ids[1:], ids[:1]]).to(logits.device)
                found.append(known_part(logits, following, _TOP).to(torch.device("cpu")))
        return found

    def _of_block(
        self,
        block: nn.Module,
        name: str,
        here: Sequence[Unit],
        call: BlockCall,
        inputs: Activations,
        own_call: BlockCall,
        states: Activations,
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return, for each unit, the block's outputs with it rounded, and its proxy losses."""
        wanted = {layer.removeprefix(f"{name}."): unit for unit in here for layer in unit.layers}
        proxies: dict[str, dict[str, list[float]]] = {unit.name: {} for unit in here}
        rounded: dict[str, Tensor] = {}
        device = self.source.device
        groups = input_groups(block, list(wanted), call, inputs.get(0, device))
        for stage in stages(block, groups):
            firsts = [group[0] for group in stage]
            rows = range(len(self.calibrating))
            sums = collect_hessians(block, firsts, call, inputs, rows, device)
            for group in stage:
                hessian = sums.pop(group[0]).mean(f"{name}.{group[0]}")
                for layer in group:
                    unit = wanted[layer]
                    weight = linear_of(block, layer).weight
                    seed = layer_seed(self.options.seed, f"{name}.{group[0]}")
                    for bits, (proxy, dense) in self._rounded(
                        weight, hessian, unit, self.options.layer, seed
                    ):
                        proxies[unit.name].setdefault(str(bits), []).append(proxy)
                        if dense is not None:
                            rounded[layer] = dense
        variants = []
        for unit in here:
            layers = [layer.removeprefix(f"{name}.") for layer in unit.layers]
            with _swapped({linear_of(block, n).weight: rounded[n] for n in layers}):
                variants.append(
                    torch.cat(
                        [
                            own_call.run(block, states.get(row, device)).cpu()
                            for row in range(len(self.pieces))
                        ]
                    )
                )
        records = [
            {
                "proxy": {b: sum(v) / len(v) for b, v in proxies[unit.name].items()},
                "probe_bits": probe_bits(unit),
            }
            for unit in here
        ]
        return variants, records

    def _rounded(
        self, weight: Tensor, hessian: Tensor, unit: Unit, settings: LayerSettings, seed: int
    ) -> Iterator[tuple[int, tuple[float, Tensor | None]]]:
        """Yield proxy loss at each of the unit's bits, and the matrix at the probe's.

        Greedy passes are left out: they gain about as much at all widths, and take longest.
        """
        for bits in unit.bytes:
            of_bits = replace(settings.with_bits(bits), npasses=0)
            if of_bits.method == "allbal":  # that is nothing but passes
                of_bits = replace(of_bits, method="ldlq")
            layer = quantize_layer(weight, hessian, of_bits, seed=seed)
            yield bits, (layer.proxy, layer.dequantize() if bits == probe_bits(unit) else None)

    def _through(self, variants: list[Tensor], calls: Sequence[BlockCall], start: int) -> None:
        """Run hidden states through the blocks from `start` on, in place."""
        if not variants:
            return
        device = self.source.device
        for index in range(start, self.layout.count):
            block = self._block(index)
            for states in variants:
                for row in range(len(states)):
                    hidden = states[row : row + 1].to(device)
                    states[row] = calls[index].run(block, hidden)[0].cpu()
            release(block)

    def _divergences(
        self,
        variants: Sequence[Tensor],
        targets: Sequence[Target],
        swap: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """Return the mean divergence of each of several last hidden states."""
        if not variants:
            return []
        model, path = self.source.model, self.layout.blocks
        self.source.load(lambda name: not name.startswith(f"{path}."))
        model.tie_weights()
        require_filled(model, except_for=(f"{path}.", *model.all_tied_weights_keys))
        swap()
        found = []
        device = self.source.device
        with logits_from_hidden(model, list(model.get_submodule(path).children())) as logits_of:
            for states in variants:
                total = 0.0
                for row, target in enumerate(targets):
                    logits = logits_of(states[row : row + 1].to(device))[0]
                    total += float(divergence(logits, target.to(device)).double().mean())
                found.append(max(0.0, total / len(targets)))
        release(model)
        return found

    def _of_outside(
        self,
        unit: Unit,
        inputs: Activations,
        states: Activations,
        calls: Sequence[BlockCall],
        targets: Sequence[Target],
    ) -> None:
        """Measure the embedding, the head, or the matrix that is both."""
        begin = time.perf_counter()
        owner = self.units.embedding if unit.name == EMBEDDING else str(self.units.head)
        shared = unit.name == EMBEDDING and self.units.tied
        self.source.load(lambda target: target == f"{owner}.weight")
        weight = self.source.model.get_parameter(f"{owner}.weight").detach()
        release(self.source.model)
        hessian = torch.eye(weight.shape[1])
        if unit.name == HEAD or shared:
            hessian = self._head_hessian(inputs, shared=shared)
        proxies: dict[str, float] = {}
        rounded: Tensor | None = None
        seed = layer_seed(self.options.seed, owner)
        for bits in unit.bytes:
            settings = self.units.outside({unit.name: bits}).quantized.get(owner)
            if settings is None:
                continue
            layer = quantize_layer(
                weight, hessian.to(weight.device), replace(settings, npasses=0), seed=seed
            )
            proxies[str(bits)] = layer.proxy
            if bits == probe_bits(unit):
                rounded = layer.dequantize()
        kl = 0.0
        if rounded is not None:
            matrix = rounded
            if unit.name == EMBEDDING:
                hidden, _ = first_inputs(
                    self.source,
                    self.layout,
                    self.pieces,
                    range(len(self.pieces)),
                    loaded=lambda: self._put(self.units.embedding, matrix),
                )
            else:
                hidden = states
            device = self.source.device
            variant = torch.cat([hidden.get(row, device).cpu() for row in range(len(self.pieces))])
            if unit.name == EMBEDDING:
                self._through([variant], calls, 0)

            def swap() -> None:
                if unit.name == HEAD:
                    self._put(owner, matrix)
                elif self.units.folded is not None:
                    self._put(str(self.units.head), self._folded_head(matrix))
                elif shared:  # one parameter for both
                    self._put(owner, matrix)

            kl = self._divergences([variant], targets, swap)[0]
        record = {"proxy": proxies, "probe_bits": probe_bits(unit), "kl": kl}
        seconds = round(time.perf_counter() - begin, 3)
        self.probes.add(unit.name, {**record, "seconds": seconds})

    def _put(self, owner: str, matrix: Tensor) -> None:
        parameter = self.source.model.get_parameter(f"{owner}.weight")
        parameter.data = matrix.to(parameter)

    def _folded_head(self, matrix: Tensor) -> Tensor:
        assert self.folded is not None
        head = TiedHead(nn.Embedding(1, matrix.shape[1], device="meta"), fold=self.folded.kind)
        head.gain = self.folded.gain.to(matrix)
        head.seed = torch.tensor([self.folded.seed])
        return head.turned(matrix)

    def _head_hessian(self, inputs: Activations, *, shared: bool) -> Tensor:
        quantizer = OutsideQuantizer(
            self.options,
            self.source,
            self.layout,
            self.units.outside({}),
            self.folded,
            WorkFolder(self.probes.path.parent, {}),
            Processes(0, 1, self.source.device),
            note=lambda record: None,
            token_weights=None,
        )
        rows = range(len(self.calibrating))
        hessian = quantizer.head_hessian(inputs, rows).mean(str(self.units.head))
        return quantizer.shared_hessian(hessian) if shared else hessian


def probe_bits(unit: Unit) -> int:
    """Return the bits at which a unit's effect on the output is measured."""
    packed = [bits for bits in unit.bytes if bits < 16]
    return min(packed, key=lambda bits: abs(bits - PROBE_BITS), default=16)


@contextmanager
def _swapped(matrices: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Put other matrices in place of parameters for a while."""
    before = {parameter: parameter.data for parameter in matrices}
    try:
        for parameter, matrix in matrices.items():
            parameter.data = matrix.to(parameter)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
