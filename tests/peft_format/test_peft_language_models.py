"""Adapters of PEFT over a language model: embeddings and output layers, tied and not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft.errors import PlanError
from weft.peft_format import load_peft, save_peft

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]

PASS = weft.Task(head=None, loss=nn.functional.mse_loss)
TENSORS = "adapter_model.safetensors"


def llama(*, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=11,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    base: nn.Module = transformers.LlamaForCausalLM(config)
    return base.eval()


def saved(base: nn.Module, folder: Path, *, embeddings: Any = "auto", **options: Any) -> nn.Module:
    """A model of PEFT over a copy of the base, away from its start, that was saved."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **options)
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor += torch.randn_like(tensor)
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return adapted.eval()  # type: ignore[no-any-return]


def loaded(base: nn.Module, folder: Path, **options: Any) -> weft.MultiTaskModel:
    model = weft.MultiTaskModel(base, weft.linear_probe(base), output="logits").eval()
    load_peft(model, "a", folder, PASS, **options)
    return model


def ids() -> Tensor:
    return torch.randint(0, 11, (3, 5))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj"], "embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
@torch.no_grad()
def test_outputs_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    base, x = llama(), ids()
    expected = saved(base, tmp_path / "1", **options)
    model = loaded(base, tmp_path / "1")
    assert_close(model(x, task="a"), expected(x).logits)
    assert_close(model.fold("a")(x).logits, expected(x).logits)
    assert not torch.allclose(expected(x).logits, base(x).logits, atol=1e-4)
    save_peft(model, "a", tmp_path / "2")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "2").eval()
    assert_close(again(x).logits, expected(x).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_of_the_base_may_have_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path, target_modules=["embed_tokens"])
    tensors = load_file(tmp_path / TENSORS)
    copies = {k: t.to(dtype) for k, t in tensors.items() if "base_layer" in k}
    assert copies
    save_file({**tensors, **copies}, tmp_path / TENSORS)
    loaded(base, tmp_path)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_another_base_than_the_adapters_is_refused(layer: str, tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path, target_modules=[layer, "q_proj"])
    with torch.no_grad():
        base.get_parameter("lm_head.weight")[0, 0] += 2.0
        base.get_parameter("model.embed_tokens.weight")[0, 0] += 2.0
    with pytest.raises(PlanError, match=rf"'.*{layer}\.base_layer\.weight'.*up to 2.*over that"):
        loaded(base, tmp_path)


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    base = llama()
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(13)
    saved(resized, tmp_path, target_modules=["q_proj"], embeddings=True)
    with pytest.raises(PlanError, match=r"shape \(13, 8\), the base's is \(11, 8\).*vocabulary"):
        loaded(base, tmp_path)
    saved(resized, tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(PlanError, match=r"embed_tokens.*shape \(13, 8\), the base's.*vocabulary"):
        loaded(base, tmp_path)
    loaded(resized, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
    ids=str,
)
def test_tied_embeddings_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    base = llama(tied=True)
    saved(base, tmp_path, **options)
    with pytest.raises(PlanError, match=r"(embed_tokens|lm_head).*tied"):
        loaded(base, tmp_path)


@torch.no_grad()
def test_tied_embeddings_that_are_left_alone_do_not_matter(tmp_path: Path) -> None:
    base, x = llama(tied=True), ids()
    for embeddings in (False, True):
        expected = saved(base, tmp_path, target_modules=["q_proj"], embeddings=embeddings)
        assert_close(loaded(base, tmp_path)(x, task="a"), expected(x).logits)


@torch.no_grad()
def test_a_layer_of_all_linear_that_is_missing_is_refused(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path, target_modules="all-linear", task_type="CAUSAL_LM")
    config = tmp_path / "adapter_config.json"
    # PEFT writes the names; other tools leave the word, which does not mean the output layer.
    spelled = config.read_text()
    start = spelled.index('"target_modules": [')
    end = spelled.index("]", start) + 1
    config.write_text(f'{spelled[:start]}"target_modules": "all-linear"{spelled[end:]}')
    loaded(base, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    kept = {k: t for k, t in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(kept, tmp_path / TENSORS)
    with pytest.raises(weft.WeftError, match=r"lacks 'model.layers.1.mlp.up_proj.lora_A.weight'"):
        loaded(base, tmp_path)


def test_a_whole_tensor_that_is_tied_does_not_go_to_peft(tmp_path: Path) -> None:
    base = llama(tied=True)
    plan = weft.lora(base, target=["q_proj"])
    name = "model.embed_tokens.weight"
    owned = {name: weft.full_finetune(base).patches[name]}
    model = weft.MultiTaskModel(base, weft.Sharing("mine", patches=owned, adapters=plan.adapters))
    model.add_task("a", PASS)
    with pytest.raises(PlanError, match=r"'model.embed_tokens.weight'.*tied to 'lm_head.weight'"):
        save_peft(model, "a", tmp_path)
