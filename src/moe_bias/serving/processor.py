"""The logits processor that vLLM loads: knows which rows of a batch belong to which adapter.

vLLM has two generations of model runners with interfaces of their own; one class has both, since a
package registers one. In the first, rows follow the batch, which is told before the head runs: the
logits are moved right at the head, and everything later (log-probabilities, grammars, penalties) is
the adapted model's. In the second, rows are told after the head (see `steps`): hidden states and base
entropies are kept there, and the logits are moved where processors run. There a request has a row for
each of its drafts, and the head's later calls of a step are for drafts and for prompts.

Shapes: B rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunner
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunner

from moe_bias.backbone import HeadTransform
from moe_bias.layer import MoEBiasLayer, entropy_from_logits
from moe_bias.mistakes import UserError
from moe_bias.serving.asked import NAME
from moe_bias.serving.embedding import embedding_of
from moe_bias.serving.keeping import KEEP, Keeping, Pass, keep_rows, keeping_of
from moe_bias.serving.notes import kept_states
from moe_bias.serving.pool import AdapterPool
from moe_bias.serving.recorder import RecordedRows, Recording, recorded, recorded_rows
from moe_bias.serving.recording import RowLayout, Spool
from moe_bias.serving.requests import RECORD, RECORD_ABOVE, VERSION
from moe_bias.serving.rows import AskedAdapter, Tenant, TenantRows, move_rows, rows_by_tenant
from moe_bias.serving.steps import HeadRows, StepRows, may_verify_in_parts, slots_of_rows
from moe_bias.serving.versions import check_made_on, read_version
from moe_bias.variables import ServingVariables, from_variables

Kept = TypeVar("Kept")
_LOG = logging.getLogger(__name__)
_PROCESSORS: WeakValueDictionary[int, MoEBiasLogitsProcessor] = WeakValueDictionary()
"""By the identity of their engine's config: an engine's model is loaded by other code than its processors."""


def processor_of(config: VllmConfig) -> MoEBiasLogitsProcessor | None:
    """The processor of an engine in this process, once there is one."""
    return _PROCESSORS.get(id(config))


class MoEBiasLogitsProcessor(FirstRunner, SecondRunner):
    """Applies to each row the adapters that its request names; requests without one are not touched."""

    def __init__(self, vllm_config: VllmConfig, device_or_state: Any, is_pin_memory: bool = False) -> None:
        """The first runner gives its device, the second the state of its requests."""
        model = vllm_config.model_config
        sizes = model.get_hidden_size(), model.get_vocab_size()
        self._config, self._sizes = vllm_config, sizes
        self._device = device_or_state if isinstance(device_or_state, torch.device) else device_or_state.device
        settings = from_variables(ServingVariables)
        self._pool = AdapterPool(self._load, settings.adapter_memory)
        layout = RowLayout.of_model(sizes[0], model.dtype)
        self._spool = None if settings.spool is None else Spool(settings.spool, layout)
        self._second_runner = vllm_config.use_v2_model_runner
        self._state: Any = device_or_state
        self._processes_all = self._second_runner and may_verify_in_parts(vllm_config)
        self._tenants: dict[int, Tenant] = {}
        self._groups: list[TenantRows] = []
        self._recordings: dict[int, Recording] = {}
        self._recorded: list[RecordedRows] = []
        self._kept_states = kept_states(layout)
        self._keepings: dict[int, Keeping] = {}
        self._due = False
        self._step: StepRows | None = None
        self._pass: Pass | None = None
        _PROCESSORS[id(vllm_config)] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError on a request for an adapter that no gate has admitted."""
        asked = sampling_params.extra_args or {}
        if NAME in asked and VERSION not in asked:
            raise ValueError(
                f"no adapters are served here, so {NAME} = {asked[NAME]!r} cannot be applied; "
                "start the server with MOE_BIAS_ADAPTERS=FOLDER, and with the plugin moe_bias where VLLM_PLUGINS is set"
            )

    def is_argmax_invariant(self) -> bool:
        """The first runner: nothing is left to do after the head."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The first runner, before each forward pass: requests that came, went or moved to another row."""
        if process_dict_updates(self._tenants, batch_update, lambda params, *_: self._tenant(params)):
            self._groups = rows_by_tenant(self._tenants, self._device)
        if process_dict_updates(self._recordings, batch_update, lambda params, _, ids: self._recording(params, ids)):
            self._recorded = recorded_rows(self._recordings, self._sizes[1], self._device)
        process_dict_updates(self._keepings, batch_update, self._keeping)
        self._due = True

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """The second runner: a request in a slot, which may have been another's."""
        tenant, recording = self._tenant(sampling_params), self._recording(sampling_params, [])
        _put(self._tenants, req_idx, tenant)
        _put(self._recordings, req_idx, recording)
        keeps = KEEP in (sampling_params.extra_args or {})
        prompt = int(self._state.prompt_len.np[req_idx]) if keeps else 0
        _put(self._keepings, req_idx, keeping_of(self._kept_states, sampling_params, prompt))
        return tenant is not None or keeps or self._processes_all

    def apply_staged_writes(self) -> None:
        """The second runner, before each forward pass."""
        self._due, self._step, self._pass = True, None, None

    @property
    def wants_passes(self) -> bool:
        """See `PassReader`."""
        return any(keeping.of_prompt for keeping in self._keepings.values())

    def on_pass(self, seen: Pass) -> None:
        """See `PassReader`; whose its tokens are the second runner says when it asks for the logits."""
        if self._second_runner:
            self._pass = seen
        else:
            seen.keep([self._keepings.get(row) for row in range(1 + max(self._keepings))])

    def on_head(self, hidden_BD: Tensor, logits_BV: Tensor, transform: HeadTransform) -> None:
        """See `HeadReader`."""
        if not self._due:
            return
        self._due = False
        if not self._second_runner:
            keep_rows({row: (kept, kept.next_position) for row, kept in self._keepings.items()}, hidden_BD)
            with recorded(self._recorded, self._first_place, hidden_BD, logits_BV, logits_BV):
                move_rows(logits_BV, hidden_BD, self._groups, transform)
        elif self._tenants:
            kept_BV = logits_BV.clone() if self._recordings else None
            self._step = StepRows(HeadRows(hidden_BD, entropy_from_logits(logits_BV), transform, kept_BV))

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """The first runner's logits as they are, the second's with the tenants' rows moved."""
        if ctx is None:
            assert not (self._due and self._groups), "the model's head has not run in this step"
            return logits
        slots = slots_of_rows(ctx)
        self._keep_prompts(ctx)
        tenants = {row: self._tenants[slot] for row, slot in enumerate(slots) if slot in self._tenants}
        if self._step is None:
            assert not tenants, "the model's head has not run in this step"
            return logits
        assert len(logits) == len(slots), "rows of logits are not those of the requests"
        rows = self._step.next(len(slots))
        self._keep_answers(slots, ctx, rows)
        if tenants:
            with self._recorded_drafts(slots, rows, logits, ctx):
                groups = rows_by_tenant(tenants, self._device)
                move_rows(logits, rows.hidden_BD, groups, rows.transform, rows.entropy_B)
        return logits

    def _keep_prompts(self, ctx: LogitsContext) -> None:
        """Nothing where logits are processed in parts: a part does not tell whose the pass's tokens are."""
        if self._pass is not None and not self._processes_all:
            self._pass.keep([self._keepings.get(int(slot)) for slot in ctx.idx_mapping_np])
        self._pass = None

    def _keep_answers(self, slots: list[int], ctx: LogitsContext, rows: HeadRows) -> None:
        kept = {row: self._keepings[slot] for row, slot in enumerate(slots) if slot in self._keepings}
        positions = ctx.pos.tolist() if kept else []
        keep_rows({row: (keeping, positions[row]) for row, keeping in kept.items()}, rows.hidden_BD)

    def _first_place(self, row: int) -> int:
        return len(self._recordings[row].tokens)

    def _recorded_drafts(
        self, slots: list[int], rows: HeadRows, logits_BV: Tensor, ctx: LogitsContext
    ) -> AbstractContextManager[None]:
        """Records the rows that tokens may be drawn from."""
        if rows.logits_BV is None or not self._recordings.keys() & set(slots):
            return nullcontext()
        places = self._places(slots, ctx)
        recordings = {row: self._recordings[slots[row]] for row in places}
        groups = recorded_rows(recordings, self._sizes[1], self._device)
        return recorded(groups, places.__getitem__, rows.hidden_BD, rows.logits_BV, logits_BV)

    def _places(self, slots: list[int], ctx: LogitsContext) -> dict[int, int]:
        """Places in their files of the rows that are recorded: how many tokens of its answer a row follows.

        Not of rows that are computed again, of a prompt or of tokens that were drawn before the request lost its
        place: no token is drawn from them. Nor of drafts beyond the request's limit.
        """
        places = {}
        for row, (slot, position) in enumerate(zip(slots, ctx.pos.tolist(), strict=True)):
            place = position + 1 - int(self._state.prompt_len.np[slot])
            is_drawn_from = position + 1 >= int(self._state.prefill_len.np[slot])
            if slot in self._recordings and is_drawn_from and place < self._recordings[slot].file.rows:
                places[row] = place
        return places

    def _load(self, version: Path) -> MoEBiasLayer:
        """An adapter's layer with its table made, which no step has to make.

        Its files were checked where its request came in. What was made on another model could be refused there
        alone: vLLM ends an engine whose processor raises. Where the engine's embedding was not known there, the
        adapter is applied as it was asked for, and the log says that it is the wrong one.
        """
        embedding = embedding_of(self._config)
        layer = read_version(version, *self._sizes, None if embedding is None else embedding.rows).to(self._device)
        try:
            check_made_on(version, None if embedding is None else embedding.sample)
        except UserError as error:
            _LOG.error("an adapter that is served does not fit the model: %s", error)
        layer.table()
        return layer

    def _tenant(self, params: SamplingParams) -> Tenant | None:
        asked = params.extra_args or {}
        if NAME not in asked:
            return None
        return Tenant(tuple(self._adapter(Path(version), strength) for _, version, strength in asked[VERSION]))

    def _adapter(self, version: Path, strength: float | None) -> AskedAdapter:
        layer = self._pool.get(version)
        return AskedAdapter(version, layer.strength if strength is None else strength, layer)

    def _recording(self, params: SamplingParams, output_ids: list[int]) -> Recording | None:
        """Where to keep what a request samples; its file was there when it was admitted."""
        asked, tenant = params.extra_args or {}, self._tenant(params)
        if RECORD not in asked or tenant is None or self._spool is None:
            return None
        try:
            file = self._spool.open(asked[RECORD], params.max_tokens or 0)
        except UserError as error:
            _LOG.warning("a request is not recorded: %s", error)
            return None
        (adapter,) = tenant.adapters  # the gate refuses to record several
        above = asked.get(RECORD_ABOVE, -math.inf)
        return Recording(adapter.layer, params.temperature, file, above, output_ids)

    def _keeping(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Keeping | None:
        return keeping_of(self._kept_states, params, len(prompt_ids or ()), output_ids)


def _put(kept: dict[int, Kept], slot: int, value: Kept | None) -> None:
    """In the place of what a slot's last request left."""
    kept.pop(slot, None)
    if value is not None:
        kept[slot] = value
