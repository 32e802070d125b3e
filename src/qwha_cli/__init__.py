"""qwha: fine-tune 2-, 3- and 4-bit language models with Walsh-Hadamard adaptation (arXiv 2509.17428).

Importing this package imports nothing heavy. `import qwha_cli.integrations` teaches peft and transformers our formats.
"""

__version__ = "0.1.0"
