"""Import this module, and peft and transformers know QWHA adapters and bases.

    import qwha_cli.integrations
    model = AutoModelForCausalLM.from_pretrained("runs/x/1-quantize")
    model = PeftModel.from_pretrained(model, "runs/x/3-train")

It is the one module of the package whose import has an effect, because that is what it is for: neither library has entry points.
Importing it twice does nothing more.
"""

from __future__ import annotations

from qwha_cli.adapters.peft_bridge import register as _register_adapter
from qwha_cli.quant.transformers_plugin import register as _register_quantizer

_register_adapter()
_register_quantizer()
