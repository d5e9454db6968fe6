import pytest

from rag_retrieval.serve.config import TOKEN_VARIABLE
from rag_retrieval.serve.http import Admission, RequestError, is_authorized, read_token


def test_places_are_given_back_even_after_an_error():
    admission = Admission(max_requests=1, max_documents=10, timeout=30)
    with pytest.raises(KeyError), admission.admit_request(0), admission.admit_documents(10):
        raise KeyError
    assert (admission.requests, admission.documents) == (0, 0)
    with admission.admit_request(0), admission.admit_documents(10):
        assert (admission.requests, admission.documents) == (1, 10)
        with pytest.raises(RequestError, match="1 requests"), admission.admit_request(0):
            pass
        with pytest.raises(RequestError, match="10 documents"), admission.admit_documents(1):
            pass
        assert (admission.requests, admission.documents) == (1, 10)


def test_a_full_queue_says_when_to_try_again():
    for expected, retry_after in ((0.0, 1), (2.3, 3), (14.1, 15)):
        with pytest.raises(RequestError) as caught, Admission(0, 10, timeout=30).admit_request(expected):
            pass
        assert (caught.value.status, caught.value.retry_after) == (429, retry_after)


def test_a_request_is_refused_while_the_wait_is_over_half_of_the_time_out():
    admission = Admission(5, 10, timeout=30)
    with admission.admit_request(15.0):
        pass
    for expected, retry_after in ((15.1, 16), (1000.0, 60)):
        with pytest.raises(RequestError) as caught, admission.admit_request(expected):
            pass
        assert (caught.value.status, caught.value.retry_after) == (429, retry_after)


def test_the_file_wins_over_the_environment_and_neither_means_that_none_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert read_token(None) == b"from-environment"
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(str(tmp_path / "token")) == b"from-file"


def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(tmp_path, monkeypatch):
    for text in ("", "\n", "two words", "zwei\nzeilen", "schlüssel"):
        monkeypatch.setenv(TOKEN_VARIABLE, text)
        (tmp_path / "token").write_text(text, encoding="utf-8")
        for place, file in ((TOKEN_VARIABLE, None), (str(tmp_path / "token"), str(tmp_path / "token"))):
            with pytest.raises(ValueError, match="expected one token") as caught:
                read_token(file)
            assert str(caught.value).startswith(place)
            assert not text.strip() or text not in str(caught.value)


def test_only_the_whole_token_after_bearer_is_let_in():
    assert is_authorized(None, None) and is_authorized("Bearer anything", None)
    assert is_authorized("Bearer secret", b"secret")
    assert is_authorized("bearer  secret ", b"secret")
    for header in (None, "", "secret", "Basic secret", "Bearer", "Bearer secre", "Bearer secret1", "Bearer sécret"):
        assert not is_authorized(header, b"secret")
