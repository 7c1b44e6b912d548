"""The code under "How to use" of a model card: it loads the model and runs it, for the tasks that it is tested for."""

from typing import TYPE_CHECKING

from peft import PeftModel

if TYPE_CHECKING:
    from ..trainer.trainer import GRMixin

#: Task -> what its pipeline is called with.
PIPELINES = {
    "image-classification": '"image.png"',
    "text-classification": '"Some text"',
    "token-classification": '"Some text"',
    "text-generation": '"Some text"',
    "fill-mask": 'f"Some {model.tokenizer.mask_token}"',
}
#: Tasks without a pipeline -> their class, and what is done with `model` and `tokenizer`.
_SEQ2SEQ = (
    "AutoModelForSeq2SeqLM",
    'inputs = tokenizer("Some text", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))",
)
MODELS = {
    "summarization": _SEQ2SEQ,
    "translation": _SEQ2SEQ,
    "question-answering": (
        "AutoModelForQuestionAnswering",
        'inputs = tokenizer("A question?", "Some text with the answer.", return_tensors="pt")\n'
        "outputs = model(**inputs)\n"
        "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()\n"
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
    ),
    "multiple-choice": (
        "AutoModelForMultipleChoice",
        'inputs = tokenizer(["A question?"] * 2, ["One answer", "Another one"], padding=True, return_tensors="pt")\n'
        "print(model(**{name: values[None] for name, values in inputs.items()}).logits.softmax(-1))",
    ),
}


def usage(trainer: "GRMixin", task: str | None, model_name: str, base_model: str | None) -> str | None:
    """Code that loads the model and runs it; None where nobody else could, or nobody knows how."""
    if trainer.processing_class is None:  # the folder lacks the tokenizer or image processor
        return None
    if isinstance(trainer.model, PeftModel):
        return adapter_usage(trainer.hub_model_id, task, model_name) if base_model else None
    where = repr_of(trainer.hub_model_id or model_name)
    # A model that transformers does not have is saved with its code.
    own_code = ", trust_remote_code=True" if getattr(trainer.model.config, "auto_map", None) else ""
    if task in PIPELINES:
        return (
            f'from transformers import pipeline\n\nmodel = pipeline("{task}", model={where}{own_code})\n'
            f"print(model({PIPELINES[task]}))"
        )
    if task in MODELS:
        name, code = MODELS[task]
        return (
            f"from transformers import {name}, AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained({where})\n"
            f"model = {name}.from_pretrained({where}{own_code})\n{code}"
        )
    return None


def adapter_usage(hub_model_id: str | None, task: str | None, model_name: str) -> str | None:
    """The base model is found by the name that the adapter's configuration has."""
    if task != "text-generation":
        return None
    where = repr_of(hub_model_id or model_name)
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, pipeline\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({where})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n"
        'print(pipeline("text-generation", model=model, tokenizer=tokenizer)("Some text"))'
    )


def repr_of(name: str) -> str:
    """A name as a string of Python, in double quotes."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\x60") + '"'
