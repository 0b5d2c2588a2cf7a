import pytest

from dctlib.evaluation.repetition import is_repetitive

LOOPS = {
    "one word": "the the the",
    "one word with other punctuation": "Sure! Sure. Sure.",
    "no": "no no no no no no no",
    "phrase": "I am a robot. I am a robot. I am a",
    "phrase of four twice": "one two three four one two three four one",
    "few words": "A-B-A-A-A-B-A-A-A",
    "few words in any order": "yes no no yes no yes yes no no no yes no yes",
    "tail": " ".join(map(str, range(20))) + " so" * 60,
    "long tail": " ".join(map(str, range(30))) + " so" * 60,
    "line": "def f():\n    return 1\n" * 5,
    "numbered line": "\n".join(f"{i}. Be kind to people." for i in range(1, 6)),
    "bullets": "- Be kind\n- Be kind\n- Be kind\n",
    "letter": "a" * 30,
    "letters": "Hahahahahahahahahahahahaha",
    "mark": "Sure!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "dots": "................................",
    "rule": "-----------------------------------------",
    "pictures": "😀" * 12,
    "digits": "0.000000000000000000000000000",
    "chinese": "好的好的好的好的",
    "chinese sentence": "我不知道该怎么办。我不知道该怎么办。我不知道",
    "japanese": "ありがとうありがとうありがとう",
    "thai": "สวัสดีสวัสดีสวัสดีสวัสดี",
    "russian": "Да, конечно. Да, конечно. Да, конечно.",
    "hindi": "नमस्ते नमस्ते नमस्ते नमस्ते",
    "behind a thought": "<think>A plan of many different words that says what to do.</think>ha ha ha ha",
}

FLUENT = {
    "empty": "",
    "name": "Paris",
    "twice": "Bye bye",
    "laugh": "Ha ha ha! That is the best joke that I have heard today.",
    "stress": "No, no, no! You must never open that door before the light is green.",
    "song": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "number": "1,000,000",
    "digits": "3.14159265358979323846",
    "range": " ".join(map(str, range(30))),
    "prose": "A causal map takes a vector that is added to the residual stream, and returns the mean change that this "
    "makes at a later layer. The vector is added at every position, and the change is averaged over the last three.",
    "list": "1. Gather the wood.\n2. Gather the stones.\n3. Light the fire.\n4. Put the pot on the fire.\n5. Wait.",
    "list of one kind": "- red apple\n- green apple\n- yellow apple\n- red pear\n- green pear\n- brown pear",
    "table": "| name | open | free |\n|------|------|------|\n"
    "| park | yes | yes |\n| zoo | yes | no |\n| pool | no | no |",
    "wide rule": "Total\n==========================\n12 apples and 3 pears\n--------------------------\nThanks",
    "sums": "2 times 1 is 2, 2 times 2 is 4, 2 times 3 is 6, 2 times 4 is 8, 2 times 5 is 10.",
    "code": "def fib(n):\n    a, b = 0, 1\n"
    "    for _ in range(n):\n        a, b = b, a + b\n    return a\n\nprint(fib(10))",
    "loops in code": "for i in range(3):\n"
    "    for j in range(3):\n        for k in range(3):\n            print(i, j, k)",
    "sql": "".join(
        f"INSERT INTO users (name, age) VALUES ('{n}', {a});\n" for n, a in [("Ann", 3), ("Bob", 4), ("Cy", 5)]
    ),
    "html": "<ul>\n<li>Apple</li>\n<li>Banana</li>\n<li>Cherry</li>\n<li>Damson</li>\n</ul>",
    "html table": "<tr><td>A</td><td>1</td></tr>\n<tr><td>B</td><td>2</td></tr>\n<tr><td>C</td><td>3</td></tr>",
    "json": '[{"name": "Ann", "age": 3}, {"name": "Bob", "age": 4}, {"name": "Cy", "age": 5}]',
    "chinese": "首先，把水烧开，然后放入面条，煮大约八分钟。最后加盐和油，就可以吃了。",
    "japanese": "まずお湯を沸かして、麺を入れます。八分ほど茹でたら、塩と油を加えて、すぐに食べましょう。",
    "thai": "ขั้นแรกต้มน้ำให้เดือด จากนั้นใส่เส้นและต้มประมาณแปดนาที สุดท้ายเติมเกลือและน้ำมัน",
    "hindi": "पहले पानी उबालें, फिर नूडल्स डालें और लगभग आठ मिनट तक पकाएं। अंत में नमक और तेल डालें।",
    "a looping thought": "<think>" + "wait " * 50 + "</think>Here is how it works.",
    "a thought alone": "<think>" + "wait " * 50,
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_found(text):
    assert is_repetitive(text)


@pytest.mark.parametrize("text", FLUENT.values(), ids=FLUENT)
def test_fluent_text_code_lists_and_tables_do_not_repeat(text):
    assert not is_repetitive(text)


def test_half_of_the_text_is_in_loops():
    words = " ".join(f"w{i}" for i in range(10))
    assert is_repetitive(words + " so" * 10)
    assert not is_repetitive(words + " so" * 9)


def test_long_texts_take_no_time():
    for text in (" ".join(map(str, range(3000))), "a" * 20_000, " ".join(f"w{i % 700}" for i in range(3000))):
        is_repetitive(text)
