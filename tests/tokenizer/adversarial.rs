//! Texts that break tokenizers, and a small corpus to train on.

use trireme::rng::Random;

/// A source of choices.
pub struct Choices {
    stream: Random,
    next: u64,
}

impl Choices {
    /// The choices of this seed.
    pub fn new(seed: u64) -> Choices {
        Choices { stream: Random::new(seed, "adversarial texts"), next: 0 }
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        (self.stream.bits(self.next) % n as u64) as usize
    }

    /// One of these.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const FRAGMENTS: [&str; 64] = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\u{2581}",
    "\u{2581}\u{2581}",
    "\u{a0}",
    "\u{2009}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "\u{85}",
    "\0",
    "\u{1}",
    "\u{7f}",
    "\u{ad}",
    "\u{fffd}",
    "\u{fffe}",
    "\u{10ffff}",
    "\u{2585}",
    "the",
    " the",
    "ing",
    "hello world",
    "foo_bar(baz)",
    "}\n    return",
    "::<u8>",
    "0",
    "7",
    "2024",
    "1,234.5e-6",
    "\u{ff11}\u{ff12}",
    "\u{661}\u{662}",
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<0x0A>",
    "<0xFF>",
    "<extra_id_0>",
    "<extra_id_1>",
    "<extra_id_",
    "<extra",
    "_id_0>",
    "unk",
    "a",
    "aa",
    "aaa",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Stra\u{df}e",
    "e\u{301}\u{302}",
    "\u{301}",
    "\u{5e9}\u{5dc}\u{5d5}\u{5dd}",
    "\u{645}\u{631}\u{62d}\u{628}\u{627}",
    "\u{202e}abc\u{202c}",
    "\u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467}",
    "\u{1f1e9}\u{1f1ea}",
    "\u{1f44d}\u{1f3fd}",
    "\u{4f60}\u{597d}\u{4e16}\u{754c}",
    "\u{3053}\u{3093}\u{306b}\u{3061}\u{306f}",
    "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442}",
    "\u{e2a}\u{e27}\u{e31}\u{e2a}\u{e14}\u{e35}",
];

/// Texts by hand: the ones with a name, and the shortest of every sort.
pub fn by_hand() -> Vec<Vec<u8>> {
    let mut texts: Vec<Vec<u8>> = FRAGMENTS.iter().map(|text| text.as_bytes().to_vec()).collect();
    texts.push(Vec::new());
    let bad: [&[u8]; 14] = [
        b"\xff",
        b"\x80",
        b"\xc3",
        b"\xe2\x96",
        b"\xe2\x96 \x81",
        b"\xc0\xaf",
        b"\xe0\x80\xaf",
        b"\xed\xa0\x80",
        b"\xed\xa0\xbd\xed\xb8\x80",
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"abc\xf0\x9f\x98",
        b"\xfe\xffab",
        b"a\xe2\x82b\xe2\x82\xacc",
    ];
    texts.extend(bad.iter().map(|text| text.to_vec()));
    let inside = [
        "a<extra_id_0>b",
        "un<extra_id_0>der",
        "<extra_id_0><extra_id_0>",
        "<extra_id_<extra_id_0>0>",
        "<extra_id_00>",
        " <extra_id_1> ",
        "x<extra_id_1",
        "<<extra_id_0>>",
    ];
    texts.extend(inside.iter().map(|text| text.as_bytes().to_vec()));
    texts.extend((0..=70).map(|n| "a".repeat(n).into_bytes()));
    texts.extend((0..=70).map(|n| " ".repeat(n).into_bytes()));
    texts.extend((1..40).map(|n| format!("{}x{}", " ".repeat(n), "\t".repeat(n)).into_bytes()));
    texts
}

/// `n` random texts: fragments in a row, random bytes, random characters, letters of a tiny alphabet, cut-up fragments.
pub fn random(seed: u64, n: usize) -> Vec<Vec<u8>> {
    let mut choices = Choices::new(seed);
    (0..n).map(|i| one_random(&mut choices, i % 5)).collect()
}

fn one_random(choices: &mut Choices, sort: usize) -> Vec<u8> {
    let length = 1 + choices.below(60);
    match sort {
        0 => (0..length / 3 + 1).flat_map(|_| choices.one(&FRAGMENTS).as_bytes().to_vec()).collect(),
        1 => (0..length).map(|_| choices.below(256) as u8).collect(),
        2 => (0..length).map(|_| random_char(choices)).collect::<String>().into_bytes(),
        3 => (0..2 * length).map(|_| choices.one(b"aabbe  nit<0")).collect(),
        _ => {
            let mut text: Vec<u8> = (0..length / 3 + 2).flat_map(|_| choices.one(&FRAGMENTS).as_bytes().to_vec()).collect();
            for _ in 0..3 {
                text.remove(choices.below(text.len().max(1)).min(text.len() - 1));
                text.push(b' ');
            }
            text
        }
    }
}

fn random_char(choices: &mut Choices) -> char {
    let planes = [0x80, 0x250, 0x800, 0x3000, 0x1_0000, 0x11_0000];
    let below = choices.one(&planes);
    char::from_u32(choices.below(below) as u32).unwrap_or('\u{2581}')
}

/// A corpus in plain lines: English-like words with a skewed frequency, code, digits, several scripts.
pub fn corpus(seed: u64, lines: usize) -> String {
    let mut choices = Choices::new(seed);
    let syllables =
        ["the", "in", "ter", "na", "tion", "al", "re", "con", "ing", "er", "a", "o", "un", "st", "ly", "ment", "ab", "ca", "de", "for"];
    let words: Vec<String> = (0..400).map(|_| (0..1 + choices.below(4)).map(|_| choices.one(&syllables)).collect()).collect();
    let foreign = [
        "\u{41f}\u{440}\u{438}\u{432}\u{435}\u{442}",
        "\u{4f60}\u{597d}\u{4e16}\u{754c}",
        "\u{3b1}\u{3b2}\u{3b3}",
        "na\u{ef}ve",
        "e\u{301}te\u{301}",
        "\u{5e9}\u{5dc}\u{5d5}\u{5dd}",
    ];
    let code = ["fn main() {", "    return x;", "        self.value += 1;", "}", "for i in 0..10 {", "if (a == b) {", "-- x"];
    let mut text = String::new();
    for _ in 0..lines {
        match choices.below(8) {
            0 => text.push_str(choices.one(&code)),
            1 => (0..4).for_each(|_| text.push_str(&format!("{} {} ", choices.one(&foreign), choices.below(10_000)))),
            _ => {
                for _ in 0..12 {
                    let skewed = choices.below(400) * choices.below(400) / 400;
                    text.push_str(&words[skewed]);
                    text.push_str(choices.one(&[" ", " ", " ", ", ", ". "]));
                }
            }
        }
        text.push('\n');
    }
    text
}
