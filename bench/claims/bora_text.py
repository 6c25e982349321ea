"""BoRA's prior on language models: perplexity on six kinds of question against the precision tau.

A small causal transformer learns the next word on movie reviews (SST-5). Every kind of question
(TREC: abbreviations, descriptions, entities, people, places, numbers) is a task with low-rank
factors of its own; three have 50 questions to train on and three have 400. tau is in units of a
token's log-likelihood; 0 is LoRA for each kind alone, the largest is one change for all kinds. The
epoch that is best on validation is kept, and the rest of each kind is the test. "pooled" is one
LoRA that learns all kinds as one task, the limit of a large tau without its prior.

Run with: python bench/claims/bora_text.py --data DIR   (finished seeds are never run again)
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import torch
import torch.nn.functional as F
from sharing_tables import spread
from torch import Tensor, nn

import weft
from weft.methods.bora import MEAN

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
WAYS = ("prior", "pooled")
TAUS = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0, 1e4)
ROWS = {"ABBR": 50, "LOC": 50, "NUM": 50, "DESC": 400, "ENTY": 400, "HUM": 400}
SMALL, LARGE = tuple(ROWS)[:3], tuple(ROWS)[3:]
LENGTH, WORDS, WIDTH, BATCH = 20, 3000, 64, 25
PAD, START, END, UNKNOWN = range(4)

Rows = tuple[Tensor, Tensor]
Config = dict[str, Any]
Parts = dict[str, dict[str, Rows]]


class Layer(nn.Module):
    """A layer of a causal transformer, normalised first."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        read = self.first(x)
        parts = [
            layer(read).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class LanguageModel(nn.Module):
    """Words to the logits of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.answer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places.weight[: words.shape[1]]
        return self.answer(self.norm(self.layers(x)))


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean negative log-likelihood of known tokens."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)


def read(data: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Movie reviews to learn the language from, and questions by kind."""
    with np.load(data / "text_tasks.npz") as file:
        reviews = str(file["sst5_text_train"]).lower().split("\n")
        kinds: dict[str, list[str]] = {str(kind): [] for kind in file["trec_classes"]}
        for split in ("train", "val", "test"):
            texts = str(file[f"trec_text_{split}"]).lower().split("\n")
            for text, label in zip(texts, file[f"trec_y_{split}"], strict=True):
                kinds[str(file["trec_classes"][label])].append(text)
    return reviews, kinds


def encode(texts: list[str], places: dict[str, int]) -> Rows:
    """Words, and the words that follow them, (rows, LENGTH)."""
    lines = torch.full((len(texts), LENGTH + 1), PAD)
    for line, text in zip(lines, texts, strict=True):
        found = [START, *(places.get(word, UNKNOWN) for word in text.split()), END][: LENGTH + 1]
        line[: len(found)] = torch.tensor(found)
    return lines[:, :-1], lines[:, 1:]


def batches(rows: Rows, size: int, train: bool) -> Any:
    """A loader of rows."""
    dataset = torch.utils.data.TensorDataset(*rows)
    return torch.utils.data.DataLoader(dataset, size, shuffle=train)


def language_model(reviews: Rows, config: Config) -> nn.Module:
    """A base that has learned reviews."""
    base = LanguageModel()
    model = weft.MultiTaskModel(base, weft.full_finetune(base))
    model.add_task("reviews", weft.Task(head=nn.Identity(), loss=token_loss))
    weft.fit(
        model, {"reviews": batches(reviews, 64, train=True)}, epochs=config["base_epochs"],
        steps=config["steps"], lr=0.003, optimizer="adamw", weight_decay=0.01,
        seed=config["seed"], progress=False,
    )  # fmt: skip
    return model.eval().fold("reviews")


def adapted(base: nn.Module, tau: float, parts: Parts, config: Config) -> weft.MultiTaskModel:
    """The tasks, trained together under the prior, at their epochs that are best on validation."""
    tokens = {kind: int((target != PAD).sum()) for kind, (_, target) in parts["train"].items()}
    average = statistics.fmean(tokens.values())
    plan = weft.bora(base, tau=tau, r=config["rank"], alpha=config["rank"], rows=average)
    torch.manual_seed(config["seed"])
    model = weft.MultiTaskModel(base, plan)
    for kind in tokens:
        model.add_task(kind, weft.Task(head=nn.Identity(), loss=token_loss))
    data = {
        kind: (batches(parts["train"][kind], BATCH, train=True),
               batches(parts["val"][kind], 500, train=False))
        for kind in tokens
    }  # fmt: skip
    weft.fit(
        model, data, epochs=config["epochs"], steps=config["steps"], lr=config["lr"],
        optimizer="adamw", weights={kind: count / average for kind, count in tokens.items()},
        seed=config["seed"], progress=False,
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def losses(network: Callable[[Tensor, str], Tensor], parts: dict[str, Rows]) -> dict[str, float]:
    """By task, the mean negative log-likelihood of a token."""
    return {
        kind: float(token_loss(network(words, kind), target))
        for kind, (words, target) in parts.items()
    }


def split(kinds: dict[str, list[str]], seed: int) -> dict[str, dict[str, list[str]]]:
    """Questions by part and kind: those to train on, a fifth of the others, and the rest."""
    generator = np.random.default_rng(seed)
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for kind, count in ROWS.items():
        order = generator.permutation(len(kinds[kind]))
        few = count + (len(order) - count) // 5
        for part, chosen in zip(parts, np.split(order, [count, few]), strict=True):
            parts[part][kind] = [kinds[kind][i] for i in chosen]
    return parts


def run_cell(config: Config, data: Path, seed: int, way: str) -> Config:
    """All precisions, or one LoRA for all, over one base and one way to split the questions."""
    started = time.perf_counter()
    config = {**config, "seed": seed}
    reviews, kinds = read(data)
    texts = split(kinds, seed)
    known = Counter(" ".join([*reviews, *chain(*texts["train"].values())]).split())
    places = {word: 4 + i for i, (word, _) in enumerate(known.most_common(WORDS - 4))}
    parts = {
        part: {kind: encode(rows, places) for kind, rows in found.items()}
        for part, found in texts.items()
    }
    torch.manual_seed(seed)
    base = language_model(encode(reviews, places), config).eval()
    make = pooled if way == "pooled" else prior
    found = make(base, parts, config)
    return {"seed": seed, "found": found, "seconds": time.perf_counter() - started}


def prior(base: nn.Module, parts: Parts, config: Config) -> list[Config]:
    """The base alone, and what each precision comes to."""
    found: list[Config] = [{"tau": "the base", "test": losses(lambda x, _: base(x), parts["test"])}]
    for tau in config["taus"]:
        model = adapted(base, tau, parts, config)
        apart = {
            kind: math.sqrt(sum(float((own[key] - mean).square().sum())
                                for key, mean in means(model).items()))
            for kind in ROWS for own in [model.tasks[kind].own]
        }  # fmt: skip
        scores = {
            part: losses(lambda x, kind, model=model: model(x, task=kind), parts[part])
            for part in ("val", "test")
        }
        found.append({"tau": tau, "apart": apart, **scores})
    return found


def pooled(base: nn.Module, parts: Parts, config: Config) -> list[Config]:
    """One LoRA for the questions of all kinds, as one task."""
    together = {
        part: {"all": (torch.cat([x for x, _ in rows.values()]),
                       torch.cat([y for _, y in rows.values()]))}
        for part, rows in parts.items()
    }  # fmt: skip
    model = adapted(base, 0.0, together, config)
    scores = {
        part: losses(lambda x, _: model(x, task="all"), parts[part]) for part in ("val", "test")
    }
    return [{"tau": "pooled", **scores}]


def means(model: weft.MultiTaskModel) -> dict[str, Tensor]:
    """What the mean is, by the key of the own tensors; nothing without a prior."""
    return {
        key.removeprefix(MEAN): tensor.detach()
        for key, tensor in model.shared.items()
        if key.startswith(MEAN)
    }


def perplexity(found: dict[str, float], kinds: Iterable[str]) -> float:
    """The exponential of the mean over tasks."""
    return math.exp(statistics.fmean(found[kind] for kind in kinds))


def show(folder: Path) -> None:
    """Perplexities as a Markdown table."""
    print("| tau | 50 questions | 400 questions | all | all, validation | distance to the mean |")
    print("|---|---|---|---|---|---|")
    for way in WAYS:
        files = sorted(folder.glob(f"*-{way}.json"))
        results = [json.loads(file.read_text())["found"] for file in files]
        for runs in zip(*results, strict=True):
            groups: list[list[float]] = [
                [perplexity(run["test"], kinds) for run in runs] for kinds in (SMALL, LARGE, ROWS)
            ]
            groups += [[perplexity(r["val"], ROWS) for r in runs]] if "val" in runs[0] else []
            if "apart" in runs[0]:
                groups.append([statistics.fmean(run["apart"].values()) for run in runs])
            tau = runs[0]["tau"]
            name = tau if isinstance(tau, str) else f"{tau:g}"
            print(f"| {name} |", *(f"{spread(group)} |" for group in groups))


def main() -> None:
    """Run all seeds that are not there yet, and print the table."""
    parser = fleet.arguments(__doc__, HERE / "results" / "bora" / "text")
    parser.add_argument("--smoke", action="store_true", help="a few steps, one seed")
    given = parser.parse_args()
    config: Config = {"base_epochs": 10, "epochs": 30, "rank": 8, "lr": 0.003, "steps": None}
    config["taus"], out = TAUS, given.out
    cells = [(seed, way) for way in WAYS for seed in SEEDS]
    if given.smoke:
        config |= {"base_epochs": 1, "epochs": 2, "steps": 2, "taus": (0.0, 1.0)}
        cells, out = [(0, way) for way in WAYS], out.with_name(out.name + "-smoke")
    fleet.run(partial(run_cell, config, given.data), cells, out, given.jobs)
    show(out)


if __name__ == "__main__":
    main()
