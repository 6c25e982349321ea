"""The works that methods come from, as text and as BibTeX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Citation:
    """A paper.

    Args:
        key: of its BibTeX entry.
        authors: family name, given names.
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
        names = [author.partition(",")[0] for author in self.authors]
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
    ("Ben Zaken, Elad", "Ravfogel, Shauli", "Goldberg, Yoav"),
    "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    "Annual Meeting of the Association for Computational Linguistics (ACL)",
    2022,
    "2106.10199",
)
MODEL_PATCHES = Citation(
    "mudrakarta2019k",
    ("Mudrakarta, Pramod Kaushik", "Sandler, Mark", "Zhmoginov, Andrey", "Howard, Andrew"),
    "K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning",
    "International Conference on Learning Representations (ICLR)",
    2019,
    "1810.10703",
)
TAPS = Citation(
    "wallingford2022task",
    (
        "Wallingford, Matthew",
        "Li, Hao",
        "Achille, Alessandro",
        "Ravichandran, Avinash",
        "Fowlkes, Charless",
        "Bhotika, Rahul",
        "Soatto, Stefano",
    ),
    "Task Adaptive Parameter Sharing for Multi-Task Learning",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    2022,
    "2203.16708",
)
LORA = Citation(
    "hu2022lora",
    (
        "Hu, Edward J.",
        "Shen, Yelong",
        "Wallis, Phillip",
        "Allen-Zhu, Zeyuan",
        "Li, Yuanzhi",
        "Wang, Shean",
        "Wang, Lu",
        "Chen, Weizhu",
    ),
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "International Conference on Learning Representations (ICLR)",
    2022,
    "2106.09685",
)
BORA = Citation(
    "eide2024bora",
    ("Eide, Simen", "Frigessi, Arnoldo"),
    "BoRA: Bayesian Hierarchical Low-Rank Adaption for Multi-Task Large Language Models",
    "",
    2024,
    "2407.15857",
)
HARD_SHARING = Citation(
    "zhang2022rethinking",
    ("Zhang, Lijun", "Yang, Qizheng", "Liu, Xiao", "Guan, Hui"),
    "Rethinking Hard-Parameter Sharing in Multi-Domain Learning",
    "IEEE International Conference on Multimedia and Expo (ICME)",
    2022,
    "2107.11359",
)
RCM = Citation(
    "kanakis2020reparameterizing",
    (
        "Kanakis, Menelaos",
        "Bruggemann, David",
        "Saha, Suman",
        "Georgoulis, Stamatios",
        "Obukhov, Anton",
        "Van Gool, Luc",
    ),
    "Reparameterizing Convolutions for Incremental Multi-Task Learning without Task Interference",
    "European Conference on Computer Vision (ECCV)",
    2020,
    "2007.12540",
)
ADASHARE = Citation(
    "sun2020adashare",
    ("Sun, Ximeng", "Panda, Rameswar", "Feris, Rogerio", "Saenko, Kate"),
    "AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning",
    "Advances in Neural Information Processing Systems (NeurIPS)",
    2020,
    "1911.12423",
)
DYNASHARE = Citation(
    "rahimian2023dynashare",
    ("Rahimian, Elahe", "Javadi, Golara", "Tung, Frederick", "Oliveira, Gabriel"),
    "DynaShare: Task and Instance Conditioned Parameter Sharing for Multi-Task Learning",
    "",
    2023,
    "2305.17305",
)
DISPARSE = Citation(
    "sun2022disparse",
    ("Sun, Xinglong", "Hassani, Ali", "Wang, Zhangyang", "Huang, Gao", "Shi, Humphrey"),
    "DiSparse: Disentangled Sparsification for Multitask Model Compression",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    2022,
    "2206.04662",
)
PACO = Citation(
    "sun2022paco",
    ("Sun, Lingfeng", "Zhang, Haichao", "Xu, Wei", "Tomizuka, Masayoshi"),
    "PaCo: Parameter-Compositional Multi-Task Reinforcement Learning",
    "Advances in Neural Information Processing Systems (NeurIPS)",
    2022,
    "2210.11653",
)
