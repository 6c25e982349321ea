"""Tasks, heads, inputs and outputs; every mistake has an error that says what to do."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from core.small import NO_HEAD, conv_net, images, mlp, model_of, squared, vectors
from weft.errors import ConfigError, DataError, PlanError, TaskError
from weft.peft_format import load_peft, save_peft


def sized(base: nn.Module | None = None, **options: Any) -> weft.MultiTaskModel:
    base = base or mlp()
    return weft.MultiTaskModel(base, weft.linear_probe(base), **options)


# ----------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "not empty"),
        (7, "a string that is not empty, found 7"),
        ("a/b", "contains '/'"),
        ("a\\b", "contains"),
        ("a:b", "contains ':'"),
        ("a\nb", "contains"),
        (".hidden", "starts or ends with a dot or space"),
        ("end.", "starts or ends with a dot or space"),
        (" a", "starts or ends with a dot or space"),
        ("x" * 201, "at most 200 characters, found 201"),
    ],
)
def test_bad_names_are_refused(name: Any, complaint: str) -> None:
    with pytest.raises(TaskError, match=complaint.replace("\\", "\\\\")):
        sized().add_task(name, NO_HEAD)


def test_a_duplicate_is_refused_with_the_way_out() -> None:
    model = model_of(mlp())
    with pytest.raises(TaskError, match=r"'a' exists already. Remove it.*remove_task\('a'\)"):
        model.add_task("a", NO_HEAD)
    model.remove_task("a")
    model.add_task("a", NO_HEAD)
    assert model.task_names == ("b", "a")


def test_unknown_tasks_are_named_everywhere() -> None:
    model = model_of(mlp(), None, "flowers", "birds")
    for call in (
        lambda: model(vectors(), task="flower"),
        lambda: model.view("flower"),
        lambda: model.tensors("flower"),
        lambda: model.ledger("flower"),
        lambda: model.fold("flower"),
        lambda: model.harden("flower"),
        lambda: model.head("flower"),
        lambda: model.plan("flower"),
        lambda: model.penalty("flower"),
        lambda: model.task_parameters("flower"),
        lambda: model.remove_task("flower"),
        lambda: model.step({"flower": vectors()}),
    ):
        with pytest.raises(TaskError, match=r"no task 'flower'.*Close matches: flowers"):
            call()
    with pytest.raises(TaskError, match="Tasks: none yet"):
        sized()(vectors(), task="x")


def test_what_is_no_model_is_refused_by_every_function_of_models(tmp_path: Path) -> None:
    task = weft.Classification(3)
    for wrong in (None, mlp(), nn.Linear):
        for call in (
            lambda w: weft.fit(w, {}),
            lambda w: weft.evaluate(w, {}),
            lambda w: weft.export(w, "a", tmp_path / "a.pt2"),
            lambda w: weft.Bank(tmp_path).save(w),
            lambda w: save_peft(w, "a", tmp_path),
            lambda w: load_peft(w, "a", tmp_path, task),
            lambda w: weft.merge(w),
        ):
            with pytest.raises(ConfigError, match=r"weft.MultiTaskModel.*, found"):
                call(wrong)


@pytest.mark.parametrize("wrong", [None, "resnet18", nn.Linear, 3])
def test_what_is_no_module_is_no_base(wrong: Any) -> None:
    for plan in (weft.lora, weft.taps, weft.disparse, weft.full_finetune):
        with pytest.raises(PlanError, match=r"base is a torch\.nn\.Module, found"):
            plan(wrong)


def test_scripted_modules_with_tensors_are_refused_by_name() -> None:
    base = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))
    for plan in (weft.lora, weft.linear_probe):
        with pytest.raises(PlanError, match="'0' of the base is a TorchScript module"):
            weft.MultiTaskModel(base, plan(base))


def test_tasks_that_need_shared_tensors_are_refused_where_there_are_none() -> None:
    base = mlp()
    given = {
        "mixes 3 bases": weft.paco(base, k=3, bases="given"),
        "tied to a mean": weft.bora(base, mean="given"),
        "'0.weight'": weft.tie_to_mean(weft.full_finetune(base), base, 1.0, mean="given"),
    }
    for said, plan in given.items():
        for model in (weft.MultiTaskModel(base, plan), weft.MultiTaskModel(base, weft.lora(base))):
            with pytest.raises(PlanError, match=said):
                model.add_task("a", weft.Classification(3), sharing=plan)
            assert not model.task_names


def test_a_model_out_of_a_bank_takes_new_tasks(tmp_path: Path) -> None:
    """Penalties that a bank does not store are not asked for anything before training."""
    for method in ("bora", "taps", "disparse", "paco"):
        base = mlp()
        model = weft.MultiTaskModel(base, weft.method(method, base), example=vectors())
        model.add_task("a", weft.Classification(3))
        bank = weft.Bank(tmp_path / method)
        bank.save(model)
        loaded = bank.load(base)
        loaded.add_task("b", weft.Classification(2))
        assert loaded.task_names == ("a", "b")


def test_a_compiled_model_is_a_model() -> None:
    base = mlp()
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=vectors())
    model.add_task("a", weft.Classification(3))
    rows = [(vectors(), torch.zeros(len(vectors()), dtype=torch.int64))]
    compiled = torch.compile(model, backend="eager")
    assert weft.evaluate(compiled, {"a": rows}) == weft.evaluate(model, {"a": rows})


def test_an_embedding_with_a_largest_norm_leaves_the_base_alone() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 8, max_norm=1.0)
            self.layer = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.words(tokens).mean(1))

    base, tokens = Words(), torch.randint(0, 11, (6, 5))
    before = copy.deepcopy(base.state_dict())
    owner = weft.MultiTaskModel(base, weft.full_finetune(base), example=tokens)
    owner.add_task("a", weft.Classification(3))
    owned = copy.deepcopy(owner.state_dict())
    with torch.no_grad():
        owner(tokens, task="a")
    assert all(torch.equal(t, owned[name]) for name, t in owner.state_dict().items())
    owner(tokens, task="a").sum().backward()
    assert owner.tasks["a"].own["words.weight"].grad is not None
    model = weft.MultiTaskModel(base, weft.lora(base, target=["layer"]))
    model.add_task("a", weft.Classification(3))
    model.add_task("b", weft.Classification(3))
    with torch.no_grad():
        model(tokens, task="a")
        model(tokens, task=["a", "b"] * 3)
        model.predict_all(tokens)
    weft.fit(model, {"a": [(tokens, torch.tensor([0, 1, 2] * 2))]}, epochs=1, progress=False)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    plain = copy.deepcopy(base)
    torch.testing.assert_close(model.fold("a").eval()(tokens), model.view("a")(tokens))
    other = weft.MultiTaskModel(base, weft.linear_probe(base), example=tokens)
    other.add_task("c", weft.Classification(3))
    torch.testing.assert_close(other.view("c")(tokens), plain(tokens))


def test_true_is_no_index_of_a_task() -> None:
    model = sized()
    model.add_task("a", weft.Classification(3))
    model.add_task("b", weft.Classification(3))
    x = vectors()
    every = [True] * len(x)
    for task in (True, every, torch.tensor(every)):
        with pytest.raises(TaskError, match="A task is a name or an index, found True"):
            model(x, task=task)


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (torch.tensor([0.0, 1.0]), "a name or an integer index"),
        ([0, 2], r"index 2 is outside 0\.\.1"),
        ([-1, 0], r"index -1 is outside 0\.\.1"),
        ([None, "a"], "a name or an integer index .* found None"),
        (5, r"index 5 is outside 0\.\.1"),
        (None, "found None"),
    ],
)
def test_wrong_choices_of_tasks_are_refused(task: Any, complaint: str) -> None:
    model = model_of(mlp())
    with pytest.raises(TaskError, match=complaint):
        model(vectors(2), task=task)


def test_a_task_is_chosen_by_name_or_index_for_all_rows_or_each() -> None:
    model = model_of(mlp()).eval()
    x = vectors(3)
    expected = model(x, task="b")
    for choice in (1, torch.tensor(1), ["b"] * 3, (1, 1, 1), torch.tensor([1, 1, 1])):
        assert torch.equal(model(x, task=choice), expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_wrong_number_of_rows_is_refused(count: int) -> None:
    model = model_of(mlp())
    with pytest.raises(DataError, match=f"found {count} tasks for 3 rows"):
        model(vectors(3), task=["a"] * count)


def test_labels_outside_the_classes_are_refused() -> None:
    check = weft.Classification(3).check
    assert check is not None
    with pytest.raises(DataError, match=r"outside the classes: found 0\.\.3, expected 0\.\.2"):
        check(torch.zeros(2, 3), torch.tensor([0, 3]))


# ----------------------------------------------------------------------------------- heads


def test_a_head_that_is_not_built_says_what_to_give() -> None:
    model = sized()
    model.add_task("a", weft.Classification(3))
    for call in (model.task_parameters, model.head):
        with pytest.raises(TaskError, match=r"not built yet.*example=x.*or run one batch first"):
            call("a")
    assert not model.tasks["a"].head_is_built
    model(vectors(), task="a")
    assert len(model.task_parameters("a")) == 2


def test_an_example_builds_heads_at_once_without_a_trace() -> None:
    base = conv_net()
    model = weft.MultiTaskModel(base, weft.scale_bias(base), example=images(1))
    model.add_task("first", weft.Task(nn.Sequential(nn.BatchNorm1d(6).eval()), squared))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.tasks["first"].head[0].eval()
    model.add_task("a", weft.Classification(3))
    assert len(model.task_parameters("a")) == 6
    assert not model.tasks["first"].head[0].training  # other heads keep their modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_failing_dry_run_adds_no_task() -> None:
    model = sized(conv_net(), example=images(1))
    with pytest.raises(TaskError, match="A dense task reads"):
        model.add_task("a", weft.Segmentation(3))
    assert model.task_names == ()


def test_a_head_built_in_inference_mode_still_trains() -> None:
    model = sized()
    model.add_task("a", weft.Regression())
    with torch.inference_mode():
        model(vectors(), task="a")
    model(vectors(), task="a").sum().backward()
    assert all(p.grad is not None for p in model.task_parameters("a"))


class Decoder(nn.Module):
    """A head with a structure of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"value": self.linear(features), "norm": features.norm(dim=1)}


def test_heads_differ_freely() -> None:
    model = sized(example=vectors(1)).eval()
    model.add_task("classes", weft.Classification(3))
    model.add_task("number", weft.Regression())
    model.add_task("own", weft.Task(Decoder(), squared))
    model.add_task("none", NO_HEAD)
    model.add_task("made", weft.Task(lambda f: nn.Linear(f.shape[1], 7), squared))
    x = vectors(5)
    outputs = model.predict_all(x)
    assert outputs["classes"].shape == (5, 3)
    assert outputs["number"].shape == (5,)
    assert outputs["none"].shape == (5, 5)
    assert outputs["made"].shape == (5, 7)
    assert outputs["own"]["value"].shape == (5, 2)
    mixed = model(x, task=["own", "none", "classes", "number", "own"])
    assert torch.allclose(mixed[4]["value"], outputs["own"]["value"][4], rtol=1e-5, atol=1e-6)
    assert torch.allclose(mixed[1], outputs["none"][1])
    assert mixed[3].shape == ()


def test_a_head_given_as_a_module_is_copied() -> None:
    decoder = Decoder()
    task = weft.Task(decoder, squared)
    model = sized()
    model.add_task("a", task)
    model.add_task("b", task)
    heads = {id(model.head("a")), id(model.head("b")), id(decoder)}
    assert len(heads) == 3
    assert model.tasks["a"].task.head is None


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (weft.Task(lambda _: 3, squared), "a function from features to a module; .* returned int"),
        (nn.Linear(5, 2), "A task is made by weft.Classification.*found Linear"),
    ],
)
def test_wrong_heads_are_refused(task: Any, complaint: str) -> None:
    model = sized(example=vectors(1))
    with pytest.raises(TaskError, match=complaint):
        model.add_task("a", task)


def test_rows_must_come_first_in_mixed_outputs() -> None:
    class Total(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features.sum()

    model = sized()
    model.add_task("a", weft.Task(Total(), squared))
    with pytest.raises(DataError, match=r"head of 'a' gave shape \(\) for 4 rows"):
        model(vectors(), task=["a"] * 4)


# ------------------------------------------------------------------------- inputs, outputs


class Pair(nn.Module):
    """Two inputs, one optional; a structure comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, offset: float = 0.0) -> Any:
        y = self.linear(x) + offset
        return {"features": y if scale is None else y * scale, "raw": x, "name": "pair"}


def test_a_structure_without_output_names_what_there_is() -> None:
    model = sized(Pair())
    model.add_task("a", NO_HEAD)
    with pytest.raises(DataError, match=r"a dict with 'features', 'raw', 'name'.*output=\.\.\."):
        model(vectors(), task="a")


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("feature", r"output='feature' is not in a dict.*Close matches: features"),
        ("name", "output='name' gives a str, not a tensor"),
        (0, "output=0 is not in a dict"),
        (lambda out: out["name"], "gives a str, not a tensor"),
    ],
)
def test_a_wrong_output_is_named(output: Any, complaint: str) -> None:
    model = sized(Pair(), output=output)
    model.add_task("a", NO_HEAD)
    with pytest.raises(DataError, match=complaint):
        model(vectors(), task="a")


def test_inputs_come_as_tensor_tuple_dict_or_keywords() -> None:
    model = sized(Pair(), output="features").eval()
    model.add_task("a", NO_HEAD)
    model.add_task("b", NO_HEAD)
    x, scale = vectors(), torch.rand(4, 1)
    expected = model.base(x, scale)["features"]
    rows = ["a", "b", "b", "a"]
    for args, kwargs in (
        ((x, scale), {}),
        (((x, scale),), {}),
        (([x, scale],), {}),
        (({"x": x, "scale": scale},), {}),
        ((), {"x": x, "scale": scale}),
        ((x,), {"scale": scale}),
    ):
        assert torch.equal(model(*args, task="a", **kwargs), expected)
        assert torch.allclose(model(*args, task=rows, **kwargs), expected)
        assert torch.equal(model.predict_all(*args, **kwargs)["b"], expected)
    assert torch.equal(model(x, task="a", offset=1.0), model.base(x, offset=1.0)["features"])
    assert torch.equal(model.step({"a": (x, scale)}).outputs["a"], expected)
    assert torch.equal(model.step({"a": {"x": x, "scale": scale}}).outputs["a"], expected)


def test_tensors_without_rows_go_along_whole() -> None:
    model = sized(Pair(), output="features").eval()
    model.add_task("a", NO_HEAD)
    model.add_task("b", NO_HEAD)
    x, scale = vectors(), torch.rand(1, 3)
    expected = model.base(x, scale)["features"]
    assert torch.allclose(model(x, scale, task=["a", "b", "b", "a"]), expected)


@pytest.mark.parametrize("output", [0, lambda out: out[0]])
def test_outputs_of_tuples_are_picked_by_index_or_function(output: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    model = sized(Two(), output=output)
    model.add_task("a", NO_HEAD)
    x = vectors()
    assert torch.equal(model(x, task="a"), model.base.linear(x))


def test_transformers_take_a_batch_of_keywords() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=9, num_labels=4,
    )  # fmt: skip
    base = BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.randint(0, 13, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6]),
        "position_ids": torch.arange(6)[None],
    }
    model = weft.MultiTaskModel(base, weft.bias_only(base), example=batch, output="logits").eval()
    model.add_task("a", NO_HEAD)
    model.add_task("b", weft.Regression())
    expected = base(**batch).logits
    assert torch.allclose(model(**batch, task="a"), expected, atol=1e-6)
    assert torch.allclose(model(batch, task="a"), expected, atol=1e-6)
    mixed = model(**batch, task=["a", "b", "a"])
    assert torch.allclose(mixed[2], expected[2], atol=1e-6)
    loss = sum(o.sum() for o in model.train().step({"a": batch, "b": batch}).outputs.values())
    loss.backward()
    assert all(p.grad is not None for p in model.task_parameters("b"))


def test_labels_in_a_batch_of_keywords_reach_the_base() -> None:
    model = sized(Pair(), output="features")
    model.add_task("a", NO_HEAD)
    with pytest.raises(TypeError, match="labels"):
        model(vectors(), task="a", labels=torch.zeros(4))


def test_a_model_without_tasks_predicts_nothing() -> None:
    assert sized().predict_all(vectors()) == {}


def test_no_rows_give_no_outputs() -> None:
    model = model_of(mlp())
    assert model(vectors(0), task=[]) == []


# -------------------------------------------------------------------------------- the plan


def test_a_function_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"for instance weft.taps\(base\); found function"):
        weft.MultiTaskModel(mlp(), weft.taps)  # type: ignore[arg-type]


def test_a_plan_of_another_base_is_refused_with_close_matches() -> None:
    plan = weft.full_finetune(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)))
    with pytest.raises(PlanError, match=r"'full_finetune' patches '2.weight' is not in the base"):
        weft.MultiTaskModel(nn.Sequential(nn.Linear(4, 6)), replace(plan, patches=renamed(plan)))


def renamed(plan: weft.Sharing) -> dict[str, Any]:
    return {n.replace("1.", "2."): p for n, p in plan.patches.items()}


def test_copies_of_tasks_are_independent() -> None:
    model = model_of(mlp())
    other = copy.deepcopy(model)
    other.remove_task("a")
    assert model.task_names == ("a", "b")
