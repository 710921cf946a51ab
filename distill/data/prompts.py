"""How a bare question becomes a prompt: a template, as plain text or as one chat message."""

from distill.data.config import QuestionConfig
from distill.data.example import Prompt


def make_prompt(config: QuestionConfig, question: str) -> Prompt:
    """The question inside ``config.template``; with ``config.chat`` as the user's message, without space around it."""
    text = config.template.replace("{question}", question)
    return [{"role": "user", "content": text.strip()}] if config.chat else text
