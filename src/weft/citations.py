"""The works that methods come from, as text and as BibTeX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Citation:
    """A paper.

    Args:
        key: of its BibTeX entry.
        authors: full names.
        title: of the paper.
        venue: where it appeared; empty where arXiv is all.
        year: when.
        arxiv: its number there.
    """

    key: str
    authors: tuple[str, ...]
    title: str
    venue: str
    year: int
    arxiv: str

    @property
    def short(self) -> str:
        """Family names and year: Hu et al., 2022."""
        names = [author.rsplit(" ", 1)[-1] for author in self.authors]
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        return f"{who}, {self.year}"

    @property
    def bibtex(self) -> str:
        """The entry."""
        lines = [
            f"@{'inproceedings' if self.venue else 'misc'}{{{self.key},",
            f"  author = {{{' and '.join(self.authors)}}},",
            f"  title = {{{{{self.title}}}}},",
            *([f"  booktitle = {{{self.venue}}},"] if self.venue else []),
            f"  year = {{{self.year}}},",
            f"  eprint = {{{self.arxiv}}},",
            "  archiveprefix = {arXiv},",
            "}",
        ]
        return "\n".join(lines)


BITFIT = Citation(
    "benzaken2022bitfit",
    ("Elad Ben Zaken", "Shauli Ravfogel", "Yoav Goldberg"),
    "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    "Annual Meeting of the Association for Computational Linguistics (ACL)",
    2022,
    "2106.10199",
)
MODEL_PATCHES = Citation(
    "mudrakarta2019k",
    ("Pramod Kaushik Mudrakarta", "Mark Sandler", "Andrey Zhmoginov", "Andrew Howard"),
    "K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning",
    "International Conference on Learning Representations (ICLR)",
    2019,
    "1810.10703",
)
TAPS = Citation(
    "wallingford2022task",
    (
        "Matthew Wallingford",
        "Hao Li",
        "Alessandro Achille",
        "Avinash Ravichandran",
        "Charless Fowlkes",
        "Rahul Bhotika",
        "Stefano Soatto",
    ),
    "Task Adaptive Parameter Sharing for Multi-Task Learning",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    2022,
    "2203.16708",
)
LORA = Citation(
    "hu2022lora",
    (
        "Edward J. Hu",
        "Yelong Shen",
        "Phillip Wallis",
        "Zeyuan Allen-Zhu",
        "Yuanzhi Li",
        "Shean Wang",
        "Lu Wang",
        "Weizhu Chen",
    ),
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "International Conference on Learning Representations (ICLR)",
    2022,
    "2106.09685",
)
HARD_SHARING = Citation(
    "zhang2022rethinking",
    ("Lijun Zhang", "Qizheng Yang", "Xiao Liu", "Hui Guan"),
    "Rethinking Hard-Parameter Sharing in Multi-Domain Learning",
    "IEEE International Conference on Multimedia and Expo (ICME)",
    2022,
    "2107.11359",
)
ADASHARE = Citation(
    "sun2020adashare",
    ("Ximeng Sun", "Rameswar Panda", "Rogerio Feris", "Kate Saenko"),
    "AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning",
    "Advances in Neural Information Processing Systems (NeurIPS)",
    2020,
    "1911.12423",
)
DYNASHARE = Citation(
    "rahimian2023dynashare",
    ("Elahe Rahimian", "Golara Javadi", "Frederick Tung", "Gabriel Oliveira"),
    "DynaShare: Task and Instance Conditioned Parameter Sharing for Multi-Task Learning",
    "",
    2023,
    "2305.17305",
)
