"""PEFT: the module paths inside wrappers, and the model under `disable_adapter`."""

from crrelu_llm.compat import Private

# Components that PEFT and other wrappers insert into a module's path.
WRAPPERS = (
    ".base_model.model.",
    ".module.",
    "._orig_mod.",
    "._fsdp_wrapped_module.",
    "._checkpoint_wrapped_module.",
    ".base_layer.",  # one around each parameter that LoRA targets
)
COPIES = (".original_module.", ".modules_to_save.default.", ".modules_to_save.")
RELIES_ON = (
    Private("peft.utils.other:ModulesToSaveWrapper", "ε under an adapter would not be found"),
    Private("peft:PeftModel.get_base_model", "the model inside an adapter"),
    Private("peft:PeftModel.disable_adapter", "DPO's reference under an adapter"),
)


def site_path(module_path: str) -> str:
    """A module's path without the components of wrappers."""
    path = f".{module_path}."
    for prefix in WRAPPERS:
        while prefix in path:
            path = path.replace(prefix, ".")
    for part in COPIES:
        path = path.replace(part, ".")
    return path.strip(".")
