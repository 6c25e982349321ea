"""Tasks of `lora` from and to the adapter folders of PEFT; PEFT itself is not needed."""

from .loading import load_peft
from .saving import save_peft

__all__ = ["load_peft", "save_peft"]
