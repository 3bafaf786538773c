"""Which labels a model is trained on: found from its class, refused where no loss applies."""

from __future__ import annotations

from typing import Any, Literal, get_args

from rlo_core.errors import RLOError
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model
from transformers.models.auto import modeling_auto as auto

Task = Literal["causal", "seq2seq", "token", "sequence"]
"""causal: position t predicts label t+1. seq2seq, token: position t predicts label t (masked LM is
"token"). sequence: one prediction per example (images, audio clips), single- or multi-label."""

TASKS: tuple[str, ...] = get_args(Task)
_BY_MAPPING: tuple[tuple[str, Task], ...] = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "seq2seq"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "token"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "sequence"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "sequence"),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "sequence"),
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "sequence"),
    ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "sequence"),
    ("MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES", "sequence"),
)
_BY_SUFFIX: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("ForMaskedLM", "token"),
    ("ForTokenClassification", "token"),
    ("ForSequenceClassification", "sequence"),
    ("ForImageClassification", "sequence"),
    ("ForAudioClassification", "sequence"),
    ("ForVideoClassification", "sequence"),
    ("ForMultipleChoice", "sequence"),
)


_PREPENDING = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside DDP, FSDP, compile and PEFT wrappers."""
    inner: Any = unwrap_model(model)
    inner = getattr(inner, "_orig_mod", inner)
    if hasattr(inner, "get_base_model"):  # PeftModel
        inner = inner.get_base_model()
    return inner  # type: ignore[no-any-return]


def task_of(model: nn.Module) -> Task:
    """Return the task of a model.

    Raises:
        RLOError: question answering, regression, or a class that is not known.
    """
    base = base_of(model)
    name = type(base).__name__
    config: Any = getattr(base, "config", None)
    if name.endswith("ForQuestionAnswering"):
        raise RLOError(
            f"{name} has two targets per example (start and end) and no labels; rlo-hf does not "
            "train question answering"
        )
    if name.endswith("ForCTC"):
        raise RLOError(
            f"{name} is trained on CTC, a sum over all alignments of its labels, where no frame "
            "has a label of its own; a loss that is a function of cross entropy does not apply"
        )
    found = _by_name(name, encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)))
    if found is None and _shifts(base):
        found = "causal"
    if found is None:
        raise RLOError(
            f"the task of {name} is not known; give task= one of {', '.join(TASKS)} if its logits "
            "and labels are those of such a model"
        )
    if found == "sequence":
        refuse_regression(base)
    return found


def _by_name(name: str, *, encoder_decoder: bool) -> Task | None:
    if encoder_decoder and name.endswith(("ForConditionalGeneration", "EncoderDecoderModel")):
        return "seq2seq"
    # Some masked-LM classes (XLM's) are in the causal mapping too; their suffix is the better
    # witness.
    for suffix, task in _BY_SUFFIX:
        if name.endswith(suffix):
            return task
    for mapping, task in _BY_MAPPING:
        for names in getattr(auto, mapping, {}).values():
            if name == names or (isinstance(names, tuple) and name in names):
                return task
    return None


def _shifts(base: nn.Module) -> bool:
    """Whether the model's own loss is transformers' causal one (vision-language models)."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss


def refuse_regression(base: nn.Module) -> None:
    """Raise RLOError for a regression head: a rooted loss needs classes."""
    config: Any = getattr(base, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and getattr(config, "num_labels", 2) == 1):
        raise RLOError(
            f"{type(base).__name__} is set up for regression (num_labels="
            f"{getattr(config, 'num_labels', None)}, problem_type={problem!r}); a rooted loss "
            "needs classes"
        )


def is_multi_label(config: Any, labels: Tensor) -> bool:
    """Tell a multi-label problem by `config.problem_type`, else by floating labels."""
    problem = getattr(config, "problem_type", None)
    if problem is not None:
        return bool(problem == "multi_label_classification")
    return labels.is_floating_point()


def config_of(model: Any) -> Any:
    """Return the configuration of the model inside wrappers, None where it has none."""
    return getattr(base_of(model), "config", None)


def virtual_tokens(model: Any) -> int:
    """Return how many prompt tokens PEFT puts in front of every row of a model's logits."""
    inner = unwrap_model(model)
    inner = getattr(inner, "_orig_mod", inner)
    active = getattr(inner, "active_peft_config", None)
    if active is None or not getattr(active, "is_prompt_learning", False):
        return 0
    if str(getattr(active.peft_type, "value", active.peft_type)) not in _PREPENDING:
        return 0  # prefix tuning adds keys and values, no positions
    return int(active.num_virtual_tokens)


def shifted(labels: Tensor) -> Tensor:
    """Return labels moved so that position t holds what it predicts, the last one ignored."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
