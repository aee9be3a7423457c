"""Training of teachers and cartridges: what moves, what does not, what each arm learns from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.language.cartridges_file import load_cartridge
from models.language.memory_budget import FastWeightMemory
from scripts import answer
from tests.helpers import as_recorded
from training.config import compose
from training.data.statements import WORDS, StatementsData, vocabulary
from training.distributed import Processes
from training.errors import UserError
from training.evaluation.exam import examine, questions
from training.files import sha256
from training.pretrained import config_of, load_decoder, locate
from training.recipes import cartridges, cartridges_teacher, memory_budget
from training.recipes.config import PRESS_NAMES
from training.run import run
from training.run_directory import plain, run_path
from training.schema import identity

CPU = torch.device("cpu")
MODEL = ["model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.d_ff=48"]
FEW = ["data.keys=24", "data.values=24", "data.from_step=[]", "data.seq_len=64"]
SMALL = [
    *MODEL,
    "data.keys=24",
    "data.values=24",
    "data.statements=[6]",
    "data.documents=3",
    "data.batch_size=2",
    "data.seq_len=24",
    "loop.steps=2",
    "report=false",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A model that was trained for a moment, as a run exports it."""
    runs = tmp_path_factory.mktemp("teacher")
    config = compose(
        [
            "experiment=cartridges/teacher",
            *MODEL,
            f"runs_dir={runs}",
            "data.keys=24",
            "data.values=24",
            "data.statements=[4,6]",
            "data.from_step=[]",
            "data.seq_len=64",
            "data.batch_size=4",
            "recipe.eval_documents=2",
            "loop.steps=2",
            "report=false",
        ]
    )
    results = run(config)
    assert set(results["exam"]) == {"4", "4_without", "6", "6_without"}
    return run_path(config)


def built(teacher: Path, *overrides: str) -> cartridges.Cartridges:
    config = compose(
        ["experiment=cartridges/facts", f"recipe.weights={teacher}", *SMALL, "recipe.tokens=8",
         *overrides]
    )  # fmt: skip
    return cartridges.build(config, Processes(), CPU)


@pytest.mark.parametrize(
    ("shipped", "experiment"),
    [
        ("experiments/cartridges/teacher", "cartridges/teacher"),
        ("experiments/memory_budget/gated_delta", "memory_budget/reader"),
    ],
)
def test_a_shipped_model_is_what_its_command_trains_and_answers_from_its_context(
    shipped, experiment
):
    directory, config = locate(shipped), compose([f"experiment={experiment}"])
    lineage = json.loads((directory / "lineage.json").read_text())
    assert lineage["command"].startswith(f"afferent train experiment={experiment} ")
    assert lineage["weights_sha256"] == sha256(directory / "model.safetensors")
    now = plain(identity(config))
    for part in ("model", "optim", "recipe"):
        recorded = as_recorded(lineage["configuration"].pop(part), getattr(config, part))
        assert recorded == now[part], part
    assert as_recorded(lineage["configuration"], config.data) == now["data"]
    assert lineage["steps"] == config.loop.steps
    documents = StatementsData(config.data, seed=12345).heldout(6, 31)
    model = load_decoder(directory)
    for texts, low, high in (
        ([d.tokens for d in documents], 0.95, 1.0),
        ([d.tokens[:, :1] for d in documents], 0.0, 0.05),
    ):
        answer = cartridges_teacher.in_context(model, texts)
        found = examine(documents, answer, ("retrieval",))["retrieval"]["accuracy"]
        assert low <= found <= high


def test_the_teacher_exports_a_plain_decoder(teacher):
    tensors = load_file(teacher / "model.safetensors")
    assert not any(name.startswith(("back", "decoder")) for name in tensors)
    model = load_decoder(teacher)
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    assert not any(p.requires_grad for p in model.parameters())
    assert config_of(teacher).d_model == 32


def test_without_its_document_a_teacher_sees_only_the_first_token(teacher):
    config = compose(["experiment=cartridges/teacher", *MODEL, "data.statements=[6]", *FEW])
    recipe = cartridges_teacher.build(config, Processes(), CPU)
    documents = recipe.data.heldout(3, 6)
    asked = questions(documents, "retrieval")
    tokens = torch.from_numpy(asked.tokens).long()
    first = torch.zeros(len(tokens), 1, dtype=torch.long)
    expected = recipe.model(torch.cat([first, tokens], dim=1))[:, -1].argmax(-1)
    nothing = cartridges_teacher.in_context(recipe.model, [d.tokens[:, :1] for d in documents])
    assert np.array_equal(nothing(asked), expected.numpy())
    shown = torch.from_numpy(np.concatenate([d.tokens for d in documents])[asked.owners]).long()
    expected = recipe.model(torch.cat([shown, tokens], dim=1))[:, -1].argmax(-1)
    seen = cartridges_teacher.in_context(recipe.model, [d.tokens for d in documents])
    assert np.array_equal(seen(asked), expected.numpy())
    assert not np.array_equal(seen(asked), nothing(asked))


def test_the_hint_names_earlier_tokens_and_trains_through_its_two_blocks_alone():
    layers = ["model.num_layers=3", "recipe.hint_block=0"]
    config = compose(["experiment=cartridges/teacher", *MODEL, *layers])
    recipe = cartridges_teacher.build(config, Processes(), CPU)
    batch = recipe.data.batch(0)
    tokens, stated = (torch.from_numpy(batch[key])[:, :-1].long() for key in ("tokens", "stated"))
    hinted = recipe.trainer.model
    recipe.model(tokens)
    hint = hinted.hint(tokens, stated)
    hint.backward()
    blocks = recipe.model.blocks
    assert all(blocks[i].attention.q_proj.weight.grad.abs().sum() > 0 for i in (0, 1))
    assert blocks[2].attention.q_proj.weight.grad is None
    before = hint.item()
    rows = torch.optim.Adam([*hinted.back.parameters(), *hinted.said.parameters()], lr=0.03)
    for _ in range(30):
        rows.zero_grad()
        recipe.model(tokens)
        hint = hinted.hint(tokens, stated)
        hint.backward()
        rows.step()
    assert hint.item() < 0.8 * before
    with torch.no_grad():
        unlike = hinted.hint(tokens, torch.where(stated < 0, stated, stated.flip(0)))
    assert unlike > hint, "it is of what this document states"


@pytest.mark.parametrize("objective", ["distill", "labels", "next_token"])
@pytest.mark.parametrize("adapter", ["rows", "lora"])
def test_a_step_moves_every_document_of_its_own_and_no_weight(teacher, objective, adapter):
    if adapter == "lora" and objective == "next_token":
        pytest.skip("the same path as labels")
    recipe = built(teacher, f"recipe.objective={objective}", f"recipe.adapter={adapter}")
    before = {name: p.clone() for name, p in recipe.student.named_parameters()}
    recipe.step(recipe.data.batch(0))
    recipe.step(recipe.data.batch(1))
    for name, p in recipe.student.named_parameters():
        changed = (
            (p != before[name]).flatten(1).any(1) if adapter == "rows" else (p != before[name])
        )
        assert changed.all() if adapter == "rows" else changed.any(), name
    assert recipe.summary()["model_changed"] == 0.0


def test_a_step_counts_the_tokens_of_all_documents(teacher):
    recipe = built(teacher)
    assert recipe.units_per_step == recipe.data.batch(0)["tokens"][:, 1:].size == 3 * 2 * 24
    assert cartridges.estimate(recipe.config).units_per_step == recipe.units_per_step


def test_documents_are_trained_side_by_side_and_each_by_itself(teacher):
    """The gradient of one document's rows does not depend on what the others are."""
    recipe = built(teacher)
    batch = recipe.trainer.to_device(recipe.data.batch(0))
    batch["others"] = torch.zeros(len(batch["owner"]), 0)
    recipe.loss(batch, 0).backward()
    together = recipe.student.rows.keys[1].grad.clone()
    recipe.student.zero_grad()
    one = {key: value[batch["owner"] == 1] for key, value in batch.items()}
    recipe.loss(one, 0).backward()
    alone = recipe.student.rows.keys[1].grad
    assert (alone[0] == 0).all() and (alone[2] == 0).all()
    share = (one["weight"] > 0).sum() / (batch["weight"] > 0).sum()
    torch.testing.assert_close(together[1], alone[1] * share, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_divergence_from_the_model_that_sees_the_document(teacher):
    recipe = built(teacher, "recipe.top_k=1000")
    batch = recipe.trainer.to_device(recipe.data.batch(0))
    batch["others"] = torch.zeros(len(batch["owner"]), 0)
    tokens, owner = batch["tokens"].long(), batch["owner"].long()
    context = torch.cat([batch["context"].long(), tokens[:, :-1]], dim=1)
    p = recipe.teacher(context)[:, recipe.data.length :].log_softmax(-1)
    rows = recipe.student.rows().map(lambda x: x[owner])
    q = recipe.teacher(tokens[:, :-1], cache=rows).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[batch["weight"] > 0].mean()
    torch.testing.assert_close(recipe.loss(batch, 0), divergence, atol=1e-5, rtol=1e-4)


def test_with_the_whole_document_as_rows_nothing_is_left_to_learn(teacher):
    recipe = built(teacher, "recipe.tokens=32", "recipe.top_k=1000")
    assert recipe.data.length == 32
    batch = recipe.trainer.to_device(recipe.data.batch(0))
    batch["others"] = torch.zeros(len(batch["owner"]), 0)
    assert recipe.loss(batch, 0).abs() < 1e-5
    assert recipe.loss(batch, 1).abs() > 1e-4, "one position off"


def test_a_chunk_is_all_that_its_teacher_sees(teacher):
    recipe = built(teacher, "data.chunk=16", "data.asked=1.0")
    batch = recipe.trainer.to_device(recipe.data.batch(0))
    assert batch["context"].shape == (6, 16)
    answers = batch["weight"] > 0
    tokens, logprobs = recipe.teach(batch, answers)
    context = torch.cat([batch["context"], batch["tokens"][:, :-1]], dim=1).long()
    expected = recipe.teacher(context)[:, 16:][answers].log_softmax(-1).topk(20)
    torch.testing.assert_close(logprobs, expected.values, atol=1e-5, rtol=1e-4)
    assert torch.equal(tokens, expected.indices)


def test_the_model_asks_and_answers_itself(teacher):
    recipe = built(teacher, "data.author=model", "data.seq_len=30")
    batch = recipe.written(recipe.data.batch(0))
    again = recipe.written(recipe.data.batch(0))
    assert np.array_equal(batch["tokens"], again["tokens"]), "a function of seed and step"
    texts = torch.from_numpy(recipe.texts).long()
    kinds = {WORDS.index(word) for word in ("what", "hop", "list", "json", "flip")}
    for tokens, weight, owner in zip(batch["tokens"], batch["weight"], batch["owner"], strict=True):
        answers = np.concatenate([[0], weight])  # of each token
        starts = [i for i in range(len(tokens)) if not answers[i] and (i == 0 or answers[i - 1])]
        heard = texts[owner].tolist()
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            question, answer = tokens[start : start + 3], tokens[start + 3 : end]
            assert question[0] in kinds
            if len(question) == 3:
                assert question[2] == WORDS.index("=")
            heard += [WORDS.index("ask"), *question.tolist()]
            for token in answer.tolist():
                logits = recipe.teacher(torch.tensor([heard]))[0, -1]
                assert logits[token] > logits.max() - 1e-4, "the likeliest"
                heard.append(token)
    recipe.step(recipe.data.batch(0))


def test_distractors_stand_beside_and_are_never_the_document_itself(teacher):
    recipe = built(teacher, "recipe.distractors=2", "recipe.distracted=1.0")
    batch = recipe.data.batch(0)
    others = recipe.distractors(batch["owner"], np.random.default_rng(0))
    assert others.shape == (6, 2)
    for own, row in zip(batch["owner"], others, strict=True):
        assert own not in row and len(set(row.tolist())) == 2
    recipe.step(batch)
    with pytest.raises(UserError, match=r"need 4 documents"):
        built(teacher, "recipe.distractors=3")


def test_a_run_writes_cartridges_that_answer_in_a_fresh_process(teacher, tmp_path):
    config = compose(
        ["experiment=cartridges/facts", f"recipe.weights={teacher}", *SMALL, "recipe.tokens=8",
         "recipe.page=8", "recipe.eval_offsets=[4]", "recipe.eval_composed=[2]",
         f"runs_dir={tmp_path}"]
    )  # fmt: skip
    results = run(config)
    assert {"asked", "heldout", "all", "foreign", "offset_4", "composed_2"} <= set(results["exam"])
    assert results["bytes"] * 4 == results["context_bytes"]
    model = load_decoder(teacher)
    for i in range(3):
        file = run_path(config) / f"cartridge_{i}.safetensors"
        prefix, header = load_cartridge(file, model)
        assert prefix.position == header.tokens == 8 and header.lineage["document"] == i
    said = answer.run(
        answer.Asked(str(file), "what k8 =", weights=str(teacher), max_tokens=2, device="cpu")
    )
    question = torch.tensor([[WORDS.index("what"), len(WORDS) + 8, WORDS.index("=")]])
    first = vocabulary(config.data)[int(model(question, cache=prefix)[0, -1].argmax())]
    assert said.split()[0] == first
    with pytest.raises(UserError, match="'where k8 =' holds something"):
        answer.run(answer.Asked(str(file), "where k8 =", weights=str(teacher), device="cpu"))


def test_training_goes_on_from_an_earlier_cartridge_and_says_so(teacher, tmp_path):
    small = [
        "experiment=cartridges/facts", f"recipe.weights={teacher}", *SMALL, "recipe.tokens=8",
        "recipe.page=8", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    first = compose([*small, "run=first"])
    run(first)
    old = run_path(first)
    recipe = cartridges.build(compose([*small, f"recipe.start_from={old}"]), Processes(), CPU)
    own = recipe.student.rows()
    for i in range(3):
        prefix, _ = load_cartridge(old / f"cartridge_{i}.safetensors")
        for a, b in zip(own.layers, prefix.layers, strict=True):
            assert torch.equal(a[0][i], b[0]) and torch.equal(a[1][i], b[1])
    second = compose([*small, "run=second", f"recipe.start_from={old}"])
    run(second)
    for i in range(3):
        parent = load_cartridge(old / f"cartridge_{i}.safetensors")[1]
        child = load_cartridge(run_path(second) / f"cartridge_{i}.safetensors")[1]
        assert child.lineage["parents"] == [parent.content] and child.content != parent.content
    for changes, message in (
        ([f"recipe.start_from={tmp_path}"], "there is no cartridge"),
        ([f"recipe.start_from={old}", "recipe.tokens=16"], "set recipe.tokens=8"),
    ):
        with pytest.raises(UserError, match=message):
            cartridges.build(compose([*small, *changes]), Processes(), CPU)


def test_another_model_than_the_configuration_says_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"set model\.d_ff=48"):
        built(teacher, "model.d_ff=64")
    with pytest.raises(UserError, match="there is no such directory"):
        built(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither model\.json nor config\.json"):
        built(tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_text((teacher / "model.json").read_text())
    (broken / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="missing or damaged"):
        built(broken)
    (broken / "model.json").write_text(json.dumps({"name": "ttt_e2e"}))
    with pytest.raises(UserError, match="does not describe a decoder"):
        built(broken)


def test_a_name_that_the_hub_does_not_know_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="could not be had from the hub"):
        locate("nobody/nothing-of-this-name")


def test_rows_that_fill_no_page_are_refused_before_they_are_trained():
    base = ["experiment=cartridges/facts", "recipe.page=4"]
    with pytest.raises(UserError, match=r"recipe\.tokens=30 must be a multiple of recipe\.page=4"):
        compose([*base, "recipe.tokens=30"])
    compose([*base, "recipe.tokens=30", "recipe.adapter=lora"])


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A model with fast weights, exported as `memory_budget/reader` does."""
    config = compose(
        [
            "experiment=memory_budget/reader", *MODEL, *FEW, "data.statements=[4,6]",
            "data.from_step=[0,4]", "loop.steps=6", "recipe.eval_documents=4", "run=reader",
            f"runs_dir={tmp_path_factory.mktemp('reader')}",
        ]
    )  # fmt: skip
    run(config)
    return run_path(config)


def test_fast_weights_that_do_not_fit_are_one_sentence(teacher, reader):
    base = ["experiment=memory_budget/facts", f"recipe.weights={teacher}", *SMALL]
    for overrides, message in (
        ([f"recipe.fast_weights=[{teacher}]"], "its layers are full; none may keep keys and"),
        ([f"recipe.fast_weights=[{reader}]", "data.keys=25"], "it must be trained on data of"),
    ):
        with pytest.raises(UserError, match=message):
            config = compose([*base, *overrides])
            memory_budget.fast_weights(config.recipe.fast_weights[0], config.data, CPU)
    for names in ("[a/one,b/one]", "[x/window]"):
        with pytest.raises(UserError, match="directories of different names"):
            compose([*base, f"recipe.fast_weights={names}"])


def test_a_memory_budget_measures_every_memory_and_resumes(teacher, reader, tmp_path):
    overrides = [
        "experiment=memory_budget/facts", f"recipe.weights={teacher}", *SMALL,
        "recipe.study_steps=2", "recipe.ratios=[2,4]", f"runs_dir={tmp_path}",
        "loop.checkpoint_every=1", f"recipe.fast_weights=[{reader}]",
    ]  # fmt: skip
    whole = run(compose([*overrides, "run=whole"]))
    stopped = run(compose([*overrides, "run=parts", "loop.max_units=3"]))
    assert stopped["steps"] == 1
    parts = run(compose([*overrides, "run=parts"]))
    assert set(whole["memories"]) == set(parts["memories"])
    for name, cell in whole["memories"].items():
        for kind in ("retrieval", "foreign", "shuffled"):
            assert parts["memories"][name][kind]["accuracy"] == cell[kind]["accuracy"], name
        for key in ("resident_bytes", "stored_bytes", "absorb_flops", "documents"):
            assert parts["memories"][name][key] == cell[key], (name, key)
    cells = whole["memories"]
    assert cells["full"]["documents"] == 6
    for name in ("cartridge", "kvzip", "snapkv_adaptive", "random", "window"):
        assert cells[f"{name}_4"]["share_of_context"] == pytest.approx(0.25), name
    assert whole["lead"]["cartridge_4"]["mean"] == 0.0
    most = max(
        cell["retrieval"]["accuracy"]
        for name, cell in cells.items()
        if name.removesuffix("_4") in PRESS_NAMES and not name.startswith("random")
    )
    assert whole["best_press"]["4"]["retrieval"]["accuracy"] == most
    ahead = cells["cartridge_4"]["retrieval"]["accuracy"] - most
    assert whole["best_press_lead"]["4"]["mean"] == pytest.approx(ahead)
    alone = FastWeightMemory(load_decoder(reader))
    state = alone.absorb(torch.zeros(1, 20, dtype=torch.long))
    assert cells["reader"]["resident_bytes"] == alone.resident_bytes(state)


@pytest.mark.parametrize("name", ["cartridges/facts", "memory_budget/facts"])
def test_several_processes_are_refused(name, teacher):
    config = compose([f"experiment={name}", f"recipe.weights={teacher}", *SMALL])
    module = cartridges if name == "cartridges/facts" else memory_budget
    with pytest.raises(UserError, match="runs in one process"):
        module.build(config, Processes(0, 2), CPU)


def test_estimates_need_no_checkpoint():
    for name in ("cartridges/facts", "memory_budget/facts", "cartridges/teacher"):
        config = compose([f"experiment={name}"])
        module = {
            "cartridges/facts": cartridges,
            "memory_budget/facts": memory_budget,
            "cartridges/teacher": cartridges_teacher,
        }[name]
        config = dataclasses.replace(config, seed=5)
        found = module.estimate(config)
        assert found.parameters > 0 and found.memory["activations"] > 0
