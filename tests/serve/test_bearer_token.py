import pytest

from rag_retrieval.serve.bearer_token import is_authorized, read_token
from rag_retrieval.serve.config import TOKEN_VARIABLE


def test_the_file_wins_over_the_environment_and_neither_means_that_none_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert read_token(None) == b"from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(str(tmp_path / "token")) == b"from-file"


@pytest.mark.parametrize("text", ["", "\n", "two words", "zwei\nzeilen", "schlüssel"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(tmp_path, monkeypatch, text):
    monkeypatch.setenv(TOKEN_VARIABLE, text)
    (tmp_path / "token").write_text(text, encoding="utf-8")
    for place, file in ((TOKEN_VARIABLE, None), (str(tmp_path / "token"), str(tmp_path / "token"))):
        with pytest.raises(ValueError, match="expected one token") as caught:
            read_token(file)
        assert str(caught.value).startswith(place)
        assert not text.strip() or text not in str(caught.value)


def test_only_the_whole_token_after_bearer_is_let_in():
    assert is_authorized("Bearer secret", b"secret")
    assert is_authorized("bearer  secret ", b"secret")
    for header in (None, "", "secret", "Basic secret", "Bearer", "Bearer secre", "Bearer secret1", "Bearer sécret"):
        assert not is_authorized(header, b"secret")


def test_without_a_token_everyone_is_let_in():
    assert is_authorized(None, None) and is_authorized("Bearer anything", None)
