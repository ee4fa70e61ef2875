import pytest
from tests.generation.constraints.models import make_careless_tokenizer, make_tokenizer


@pytest.fixture(params=["ours", "careless"])
def tokenizer(request):
    return make_tokenizer() if request.param == "ours" else make_careless_tokenizer()
