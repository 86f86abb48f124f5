"""Text and conversations to token ids, with the kind and the message of every token.

`from_pretrained(folder)` picks the back end by the files it finds; chat formats are native or the folder's own
template.
"""

from torchmask.tokenizers.tokenizer import Tokenizer, from_pretrained

__all__ = ["Tokenizer", "from_pretrained"]
