"""Edits and prompts as tokens: templates, end-of-sequence, and which tokens carry loss.

A plain row is ``prompt + ' ' + target`` and EOS, with the tokenizer's default special tokens. With a
chat template a row is the rendered conversation up to the assistant's turn, the target, and the token
that ends the turn. Training and evaluation build prompts here and nowhere else, so that a model is
asked exactly as it was taught. (CrispEdit, arXiv 2602.15823, appendix E; design of rows: FT-M.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from .edits import Edit
from .errors import ConfigError, EditsError, ModelError, did_you_mean

Chat = Literal["auto", "on", "off"]
Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class EditRow:
    """One training row: token ids, of which those from ``prompt_length`` on carry loss."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that carry loss."""
        return self.ids[self.prompt_length :]

    @property
    def num_targets(self) -> int:
        """How many tokens carry loss."""
        return len(self.ids) - self.prompt_length


class Prompter:
    """Turns prompts and edits into token ids for one model.

    Args:
        tokenizer: The model's tokenizer.
        chat: Whether prompts go through the chat template; ``auto`` does so when there is one.
        eos: Whether targets end with an end-of-sequence (in a chat: end-of-turn) token.
        end_tokens: Further tokens at which the model stops, from its generation configuration.

    Raises:
        ConfigError: ``chat`` is not one of its values, or ``on`` without a template, or there is no
            EOS token to end targets with.
    """

    def __init__(
        self, tokenizer: Any, *, chat: Chat = "auto", eos: bool = True, end_tokens: Sequence[int] = ()
    ) -> None:
        if chat not in get_args(Chat):
            raise ConfigError(f"chat is '{chat}'; it must be auto, on or off{did_you_mean(chat, get_args(Chat))}")
        template = getattr(tokenizer, "chat_template", None)
        if chat == "on" and not template:
            raise ConfigError("chat is on, but this model's tokenizer has no chat template; use --chat auto or off")
        if eos and tokenizer.eos_token_id is None:
            raise ConfigError("this model's tokenizer has no end-of-sequence token; use --no-eos")
        self.tokenizer = tokenizer
        self.chat = bool(template) and chat != "off"
        self.eos = eos
        self._turn_end = self._find_turn_end() if self.chat else tokenizer.eos_token_id
        stops = {tokenizer.eos_token_id, self._turn_end, *end_tokens}
        self.end_tokens: tuple[int, ...] = tuple(sorted(token for token in stops if token is not None))

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, chat: Chat = "auto", eos: bool = True) -> "Prompter":
        """A prompter that also stops where the model's generation configuration says."""
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else ends or []
        return cls(tokenizer, chat=chat, eos=eos, end_tokens=ends)

    def prompt(self, prompt: str | Turns) -> tuple[int, ...]:
        """Token ids of a prompt, or of the turns of a conversation before the answer.

        Args:
            prompt: Text (in a chat: the user's message), or (role, content) turns.

        Returns:
            Ids with the special tokens that belong before the answer.

        Raises:
            EditsError: Several turns, and prompts do not go through a chat template.
        """
        return tuple(self.encode(self.text(prompt), special=not self.chat))

    def text(self, prompt: str | Turns) -> str:
        """What :meth:`prompt` turns into tokens: the prompt itself, or the rendered conversation before the answer.

        Args:
            prompt: As there.

        Returns:
            The text.

        Raises:
            EditsError: Several turns, and prompts do not go through a chat template.
        """
        turns = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if self.chat:
            return self._render(turns, answer=None)
        if len(turns) > 1:
            raise EditsError("a conversation of several turns needs a chat template; this model's prompts have none")
        return turns[0][1]

    def row(self, edit: Edit) -> EditRow:
        """The training row of an edit.

        Args:
            edit: The edit.

        Returns:
            The row; at least one of its tokens carries loss.

        Raises:
            EditsError: No token of the target is left to learn.
        """
        prompt = self.prompt(edit.turns or edit.prompt)
        end = [self._turn_end] if self.eos and self._turn_end is not None else []
        if self.chat:
            ids = [*prompt, *self.encode(edit.target, special=False), *end]
        else:
            text = edit.turns[-1][1] if edit.turns else edit.prompt
            ids = self.encode(f"{text} {edit.target}", special=True)
            ids += end
            # the tokens of the prompt are those it shares with the whole: a target may merge with its end
            shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            prompt = prompt[: max(shared, 1)]  # nothing predicts the first token
        if len(ids) <= len(prompt) + len(end):
            raise EditsError(f"row {edit.row}: the target '{edit.target}' has no token of its own")
        return EditRow(tuple(ids), len(prompt))

    def rows(self, edits: Sequence[Edit], context: int | None = None) -> list[EditRow]:
        """The training rows of edits.

        Args:
            edits: The edits.
            context: The model's context in tokens, if it has one.

        Returns:
            One row per edit.

        Raises:
            EditsError: A row is longer than the context.
        """
        rows = [self.row(edit) for edit in edits]
        for edit, row in zip(edits, rows, strict=True):
            if context is not None and len(row.ids) > context:
                raise EditsError(
                    f"row {edit.row} has {len(row.ids)} tokens; the model's context is {context}: shorten it"
                )
        return rows

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens (but no EOS) or without."""
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text themselves
            ids.pop()
        return ids

    def _render(self, turns: Turns, answer: str | None) -> str:
        """The conversation as text: up to the assistant's turn, or with the answer in it."""
        messages = [{"role": role, "content": content} for role, content in turns]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None, enable_thinking=False
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(f"the chat template cannot render a row: {error}; use --chat off") from error
        return str(text)

    def _find_turn_end(self) -> int | None:
        """The token that ends an assistant's turn: the first special one after an answer, else EOS."""
        marker = "Zq7"
        rest = self._render([("user", "Hello")], answer=marker).rpartition(marker)[2]
        ids, added = self.encode(rest, special=False), self.tokenizer.added_tokens_decoder
        # not all_special_ids: it leaves out those with no role, such as Phi-3's <|end|>
        special = [i for i in ids if i in added and added[i].special]
        return next(iter(special + [i for i in ids if i in added]), self.tokenizer.eos_token_id)
