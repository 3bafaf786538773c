"""TRL's DPO, KTO, GRPO and ORPO trainers: stock gradients by our output layer, and the link."""

import functools
import inspect
import warnings

import pytest
import torch
from rlo_core.errors import RLOError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental.*"),
]


def pairs():
    return [
        {
            "prompt": f"w3 w{4 + i}",
            "chosen": " w9" + f" w{10 + i}" * (1 + i % 3),
            "rejected": f" w{20 + i} w7 w{30 - i}",
        }
        for i in range(4)
    ]


def judged():
    rows = []
    for i, row in enumerate(pairs()):
        good = i % 2 == 0
        completion = row["chosen"] if good else row["rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": good})
    return rows


def reward(completions, **kwargs):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def host_of(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "ORPO":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer, ORPOConfig
    return getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")


def run(
    tmp_path, hf, tokenizer, kind, *, ours=True, trainer_type=None, slot=None, model=None, **more
):
    """One update; returns the trainer and its gradient."""
    import rlo_hf.trl

    stock, config = host_of(kind)
    given = {
        **hf.one_update(tmp_path),
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "seed": 3,
        "activation_checkpointing": False,
        **more,
    }
    model = hf.build("llama") if model is None else model
    if kind == "GRPO":  # it loads its reference by the name of the model
        hf.build("llama").save_pretrained(tmp_path / "reference")
        model.config._name_or_path = str(tmp_path / "reference")
    grab = hf.GrabGradients()
    rest = {"processing_class": tokenizer, "callbacks": [grab]}
    if kind == "GRPO":
        given |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
        rest |= {"reward_funcs": reward}
        rows = [{"prompt": row["prompt"]} for row in pairs()]
    else:
        rows = judged() if kind == "KTO" else pairs()
    if kind in ("DPO", "KTO"):
        rest["ref_model"] = hf.build("llama")
        with torch.no_grad():
            for parameter in rest["ref_model"].parameters():
                parameter.mul_(0.9)
    kind_of = trainer_type or (getattr(rlo_hf.trl, f"{kind}Trainer") if ours else stock)
    trainer = kind_of(
        model=model,
        args=hf.arguments_of(config, given),
        train_dataset=datasets.Dataset.from_list(rows),
        **rest,
        **(slot or {}),
    )
    torch.manual_seed(5)
    trainer.train()
    return trainer, grab.value


@pytest.fixture(scope="module")
def stock(tmp_path_factory, hf, tokenizer):
    """TRL's own, once for each kind."""

    @functools.cache
    def of(kind, **more):
        return run(tmp_path_factory.mktemp(kind), hf, tokenizer, kind, ours=False, **dict(more))

    return of


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *[("DPO", None), ("DPO", "ce"), ("KTO", None), ("KTO", "rlo:k=1")],
        *[("GRPO", None), ("ORPO", None), ("ORPO", "ce")],
    ],
)
def test_an_update_is_that_of_the_stock_trainer(tmp_path, hf, tokenizer, stock, kind, loss):
    trainer, got = run(tmp_path, hf, tokenizer, kind, slot={"loss": loss})
    theirs, expected = stock(kind)
    assert trainer.linear_path == "fused"
    assert expected.norm() > 1e-3
    assert hf.relative_error(got, expected) < 3e-6
    ours, other = trainer.state.log_history[0], theirs.state.log_history[0]
    padded = ("logits/chosen", "logits/rejected") if kind == "ORPO" else ()
    for name in set(ours) & set(other):
        if "time" not in name and "runtime" not in name and name not in padded:
            assert ours[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def rooted(x, k):
    """k (p^(-1/k) - 1) of p = sigmoid(x)."""
    return k * ((torch.nn.functional.softplus(-x) / k).exp() - 1)


def log_ratios(trainer, hf, rows, key):
    """The log ratio of each completion of the tiny model to its reference, in float64."""
    tokenizer, found = trainer.processing_class, []
    model, ref = hf.build("llama").double().train(), hf.build("llama").double()
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.mul_(0.9)
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row[key])["input_ids"] + [tokenizer.eos_token_id]
        ids, sums = torch.tensor([ids]), []
        for one in (model, ref):
            log_p = one(input_ids=ids).logits[0, :-1].log_softmax(-1)
            own = log_p.gather(1, ids[0, 1:, None]).squeeze(1)
            sums.append(own[len(prompt) - 1 :].sum())
        found.append(sums[0] - sums[1].detach())
    return model, torch.stack(found)


def test_a_link_acts_on_the_margin_of_dpo(tmp_path, hf, tokenizer):
    trainer, got = run(tmp_path, hf, tokenizer, "DPO", slot={"loss": "rlo-convex:k=2"}, beta=0.5)
    model, chosen = log_ratios(trainer, hf, pairs(), "chosen")
    other, rejected = log_ratios(trainer, hf, pairs(), "rejected")
    pulls = []
    for ratios, one in ((chosen, model), (rejected, other)):
        held = [chosen.detach(), rejected.detach()]
        held[0 if one is model else 1] = ratios
        loss = rooted(0.5 * (held[0] - held[1]), 2.0).mean()
        loss.backward()
        pulls.append(hf.gradients(one))
    assert hf.relative_error(got.double(), pulls[0] + pulls[1]) < 3e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_link_acts_on_the_logistic_term_of_kto(tmp_path, hf, tokenizer):
    """Without a reference point, which another batch gives, TRL's is measured."""
    trainer, got = run(tmp_path, hf, tokenizer, "KTO", slot={"loss": "rlo-convex:k=2"}, beta=0.5)
    kl = trainer.state.log_history[0]["kl"]
    model, ratios = log_ratios(trainer, hf, judged(), "completion")
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss = rooted(0.5 * sign * (ratios - kl), 2.0).mean()
    loss.backward()
    assert hf.relative_error(got.double(), hf.gradients(model)) < 3e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_link_acts_on_the_odds_of_orpo(tmp_path, hf, tokenizer, stock):
    """loss - nll = beta link(-log sigmoid(x)), where stock has beta (-log sigmoid(x))."""
    trainer, got = run(tmp_path, hf, tokenizer, "ORPO", slot={"loss": "rlo-convex:k=2"})
    record, theirs = trainer.state.log_history[0], stock("ORPO")[0].state.log_history[0]
    assert record["nll_loss"] == pytest.approx(theirs["nll_loss"], rel=1e-5)
    term = (record["loss"] - record["nll_loss"]) / 0.1
    assert term == pytest.approx(-record["log_odds_ratio"], rel=1e-3)
    assert term > (theirs["loss"] - theirs["nll_loss"]) / 0.1
    assert hf.relative_error(got, stock("ORPO")[1]) > 1e-4


def test_adapters_leave_the_layer_frozen_and_have_the_stock_gradient(tmp_path, hf, tokenizer):
    peft = pytest.importorskip("peft")

    def adapted(ours):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(hf.build("llama"), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return run(tmp_path, hf, tokenizer, "GRPO", ours=ours, model=model)[1]

    assert hf.relative_error(adapted(True), adapted(False)) < 3e-6


def test_what_a_margin_cannot_take_is_refused(tmp_path, hf, tokenizer):
    from rlo_hf.trl import DPOTrainer, KTOTrainer

    def foreign(logits, target):
        return logits.sum()

    with pytest.raises(RLOError, match=r"^loss 'foreign' has no link, and a margin has no logits"):
        DPOTrainer(None, loss=foreign)
    with pytest.raises(RLOError, match=r"^class weights, label smoothing and gates need logits"):
        KTOTrainer(None, loss="ce*eaft")
    with pytest.raises(RLOError, match=r"^loss_type='hinge' has no logistic term for a loss to ac"):
        run(tmp_path, hf, tokenizer, "DPO", slot={"loss": "rlo"}, loss_type="hinge")
    with pytest.raises(RLOError, match=r"^a loss needs loss_type='kto', got 'apo_zero_unpaired'$"):
        run(tmp_path, hf, tokenizer, "KTO", slot={"loss": "rlo"}, loss_type="apo_zero_unpaired")
    with pytest.raises(RLOError, match=r"^GRPO's objective is no function of cross entropy"):
        run(tmp_path, hf, tokenizer, "GRPO", slot={"loss": "rlo"})
    with pytest.raises(RLOError, match=r"^linear='fused' is not possible: the entropy bonus needs"):
        run(tmp_path, hf, tokenizer, "GRPO", slot={"linear": "fused"}, entropy_coef=0.1)


def test_a_step_that_passes_the_loss_by_is_refused(tmp_path, hf, tokenizer):
    from rlo_hf.self_check import SelfCheckError
    from rlo_hf.trl import DPOTrainer

    class Own(DPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(input_ids=inputs["input_ids"])
            return outputs.logits.square().mean()

    with pytest.raises(SelfCheckError, match=r"Own.compute_loss .*passes the loss slot by"):
        run(tmp_path, hf, tokenizer, "DPO", trainer_type=Own, slot={"loss": "rlo"})


def test_a_stock_trainer_of_another_program_is_given_the_loss(tmp_path, hf, tokenizer):
    """What `rlo-hf run trl dpo --loss SPEC` does."""
    from rlo_hf.everywhere import reach

    with reach("rlo-convex:k=2") as reached:
        _, got = run(tmp_path, hf, tokenizer, "DPO", ours=False)
        assert reached.trainers == ["DPOTrainer"]
    _, expected = run(tmp_path, hf, tokenizer, "DPO", slot={"loss": "rlo-convex:k=2"})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "ORPO"])
def test_the_arguments_are_trls_and_then_ours(kind):
    import rlo_hf.trl

    theirs = list(inspect.signature(host_of(kind)[0]).parameters)
    ours = list(inspect.signature(getattr(rlo_hf.trl, f"{kind}Trainer")).parameters)
    assert ours == [*theirs, "loss", "check", "linear"]
