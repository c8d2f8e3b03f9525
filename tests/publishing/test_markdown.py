import pytest
from markdown_it import MarkdownIt

from hf_merge.publishing.markdown import LONGEST, Markdown, block, code, listed, one_line, plain, table

HOSTILE = [
    "a|b",
    "`",
    "``x`",
    "[x](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "<script>alert(1)</script>",
    "</details>",
    "**bold** _it_ ~~no~~ $x$",
    "http://evil.example",
    "www.evil.example",
    "me@evil.example",
    "# title",
    "- item",
    "1. one",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "a\n\n---\nb: c",
    "\\`",
]


def inline_types(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    return [child.type for child in tokens[1].children or ()]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_becomes_one_code_span(text: str) -> None:
    assert inline_types(f"x {plain(text)}") == ["text", "code_inline"]


@pytest.mark.parametrize("text", ["tiny-merge", "trial 12", "uniform average", "Llama 3.1", "exact_match", "größe", "a/b"])
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_in_its_cell(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(table(["a", text, "c"], [[text, "1", "2"], ["x", text, text]]))
    assert [t.type for t in tokens].count("th_open") == 3
    assert [t.type for t in tokens].count("td_open") == 6
    assert not any(c.type in ("html_inline", "link_open", "image") for t in tokens for c in t.children or ())


@pytest.mark.parametrize("text", ["```\n# out", "~~~", "````"])
def test_a_block_holds_whatever_fences_its_text_has(text: str) -> None:
    assert [t.type for t in MarkdownIt("commonmark").parse(block(text, "yaml"))] == ["fence"]


def test_markdown_is_not_escaped_twice() -> None:
    assert plain(Markdown("**bold**")) == "**bold**"


def test_an_empty_text_is_a_visible_code_span() -> None:
    assert code("") == "` `"


def test_control_and_direction_characters_are_dropped() -> None:
    assert one_line("a\u202eb\x00c\nd") == "a b c d"


def test_a_long_text_is_cut() -> None:
    assert len(one_line("x" * 1000)) == LONGEST


@pytest.mark.parametrize(("items", "expected"), [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")])
def test_a_list_reads_as_a_sentence(items: list[str], expected: str) -> None:
    assert listed(items) == expected
