"""Anchors, read off texts written by hand."""

import pytest

from miles.data.template.anchors import Anchors, RenderedProbes, learn_anchors
from miles.errors import TemplateError

SPECIAL = ("<end>", "<eos>", "<user>", "<model>")


def learn(question: str, prompted: str, one_turn: str, two_turns: str) -> Anchors:
    texts = RenderedProbes(question, prompted, one_turn, two_turns)
    return learn_anchors(texts, SPECIAL, SPECIAL, name="a template")


def test_a_prompt_added_to_the_question() -> None:
    anchors = learn(
        question="<user>QUESTION1<end>",
        prompted="<user>QUESTION1<end><model>",
        one_turn="<user>QUESTION1<end><model>ANSWER1<end>",
        two_turns="<user>QUESTION1<end><model>ANSWER1<end><user>QUESTION2<end><model>ANSWER2<end>",
    )
    assert anchors == Anchors("<model>", "<model>", "<end>", ())


def test_a_prompt_that_closes_the_question() -> None:
    anchors = learn(
        question="[Q]QUESTION1[A]",
        prompted="[Q]QUESTION1[A]",
        one_turn="[Q]QUESTION1[A] ANSWER1<end>",
        two_turns="[Q]QUESTION1[A] ANSWER1<end>[Q]QUESTION2[A] ANSWER2<end>",
    )
    assert anchors.generation_prompt == anchors.turn_header == "[A]"


def test_a_prompt_that_replaces_the_end() -> None:
    anchors = learn(
        question="<user>QUESTION1<end><eos>",
        prompted="<user>QUESTION1<end><model>",
        one_turn="<user>QUESTION1<end><model>ANSWER1<end><eos>",
        two_turns="<user>QUESTION1<end><model>ANSWER1<end>"
        "<user>QUESTION2<end><model>ANSWER2<end><eos>",
    )
    assert anchors.generation_prompt == "<model>"
    assert anchors.terminator == "<end>"


def test_a_prompt_that_leaves_the_end_out_is_refused() -> None:
    with pytest.raises(TemplateError, match="a template has no generation prompt"):
        learn("<user>QUESTION1<end><eos>", "<user>QUESTION1<end>", "", "")


def test_empty_think_blocks_are_learned_longest_first() -> None:
    anchors = learn(
        question="<user>QUESTION1<end>",
        prompted="<user>QUESTION1<end><model><think>",
        one_turn="<user>QUESTION1<end><model><think>\n</think>ANSWER1<end>",
        two_turns="<user>QUESTION1<end><model><think></think>ANSWER1<end>"
        "<user>QUESTION2<end><model><think>\n</think>ANSWER2<end>",
    )
    assert anchors.generation_prompt == "<model><think>"
    assert anchors.turn_header == "<model>"
    assert anchors.empty_thinks == ("<think>\n</think>", "<think></think>")
