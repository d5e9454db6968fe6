import pytest

from rag_retrieval.serve.admission import Admission
from rag_retrieval.serve.refusal import Refusal


def test_places_are_given_back_even_after_an_error():
    admission = Admission(max_requests=1, max_pairs=10, timeout=30, expected_seconds=lambda: 0)
    with pytest.raises(KeyError), admission.request(), admission.documents(10):
        raise KeyError
    assert (admission.requests, admission.pairs) == (0, 0)
    with admission.request(), admission.documents(10):
        assert (admission.requests, admission.pairs) == (1, 10)
        with pytest.raises(Refusal, match=r"the queue is full \(1 requests\)"), admission.request():
            pass
        with pytest.raises(Refusal, match=r"the queue is full \(10 documents\)"), admission.documents(1):
            pass
        assert (admission.requests, admission.pairs) == (1, 10)


@pytest.mark.parametrize("expected, told", [(0.0, 1), (2.3, 3), (1000.0, 60)])
def test_a_full_queue_tells_when_to_try_again(expected, told):
    admission = Admission(max_requests=0, max_pairs=10, timeout=30, expected_seconds=lambda: expected)
    with pytest.raises(Refusal) as caught, admission.request():
        pass
    assert (caught.value.status, caught.value.retry_after) == (429, told)


def test_nobody_comes_in_while_what_waits_takes_more_than_half_of_the_time_out():
    waits = [15.0, 15.1]
    admission = Admission(max_requests=5, max_pairs=10, timeout=30, expected_seconds=lambda: waits[0])
    with admission.request():
        pass
    waits.pop(0)
    with pytest.raises(Refusal, match="try again after 16 s") as caught, admission.request():
        pass
    assert caught.value.status == 429
