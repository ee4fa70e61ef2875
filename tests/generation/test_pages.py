from __future__ import annotations

import random

from mtnlg.generation.pages import PageBooks


def file_text(books: PageBooks, tokens: list[int]) -> list[int]:
    """Take pages for a text and file the full ones, as a request does."""
    size = books.page_size
    pages = books.take(books.pages_for(len(tokens))) or []
    for place in range(len(tokens) // size):
        before = pages[place - 1] if place else None
        pages[place] = books.file(pages[place], before, tuple(tokens[place * size : (place + 1) * size]))
    return pages


def contents(tokens: list[int], size: int = 4) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(0, len(tokens) // size * size, size)]


def test_a_beginning_is_found_page_by_page_and_only_in_its_place():
    books = PageBooks(10, 4)
    text = list(range(12))
    pages = file_text(books, text)
    books.give_back(pages)
    assert books.num_free == 10 and books.num_kept == 3
    assert books.count(contents(text)) == 3
    assert books.find(contents(text[:8] + [99] * 4)) == pages[:2]
    assert books.num_free == 8
    assert books.find(contents(text[4:])) == []  # the same tokens after nothing are another page


def test_what_two_computed_at_once_is_kept_once():
    books = PageBooks(10, 4)
    first = books.take(1)
    second = books.take(1)
    assert books.file(first[0], None, (1, 2, 3, 4)) == first[0]
    assert books.file(second[0], None, (1, 2, 3, 4)) == first[0]
    assert books.num_free == 9
    books.give_back(first)
    assert books.num_free == 9  # the second holds it still
    books.give_back(first)
    assert books.num_free == 10


def test_the_longest_unused_goes_first_and_ends_before_beginnings():
    books = PageBooks(6, 4)
    old, new = [1] * 12, [2] * 12
    old_pages = file_text(books, old)
    new_pages = file_text(books, new)
    books.give_back(old_pages)
    books.give_back(new_pages)
    assert books.take(1) == old_pages[2:]
    assert books.count(contents(old)) == 2
    assert books.find(contents(old)) == old_pages[:2]  # used again, so the other is the oldest now
    assert books.take(1) == new_pages[2:]
    assert books.count(contents(new)) == 2


def test_nothing_is_given_that_someone_holds():
    books = PageBooks(3, 4)
    assert len(books.take(3) or []) == 3
    assert books.take(1) is None


def test_forgotten_pages_are_free_and_never_found():
    books = PageBooks(6, 4)
    held = file_text(books, [1] * 8)
    idle = file_text(books, [2] * 8)
    books.give_back(idle)
    books.forget()
    assert books.count(contents([1] * 8)) == books.count(contents([2] * 8)) == 0
    assert books.file(held[1], held[0], (9, 9, 9, 9)) == held[1]  # after a page that nobody can find
    books.give_back(held)
    assert books.num_free == 6 and books.num_kept == 0
    assert sorted(books.take(6) or []) == list(range(6))


def test_no_page_is_lost_or_given_twice():
    """Many texts that share beginnings come and go at random; the books always add up."""
    rng = random.Random(0)
    books = PageBooks(40, 4)
    texts = [[rng.randrange(2) for _ in range(rng.randrange(1, 30))] for _ in range(200)]
    held: list[list[int]] = []
    for text in texts:
        found = books.find(contents(text))
        more = books.take(books.pages_for(len(text)) - len(found))
        if more is None:
            books.give_back(found)
        else:
            pages = found + more
            for place in range(len(found), len(text) // 4):
                before = pages[place - 1] if place else None
                pages[place] = books.file(pages[place], before, contents(text)[place])
            held.append(pages)
        while held and (more is None or rng.random() < 0.3):
            books.give_back(held.pop(rng.randrange(len(held))))
            if books.num_free > 10:
                break
        holders = [page for pages in held for page in set(pages)]
        assert books.num_free == 40 - len(set(holders))
    for pages in held:
        books.give_back(pages)
    assert books.num_free == 40
    assert sorted(books.take(40) or []) == list(range(40))
