//! Which tokens are run: calibration sequences drawn from a text, evaluation windows cut from one.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{
    ChatTemplate, Document, LeftOut, Message, SampleError, SampleSource, Samples, Tally, Text, Tokenizer, sha256_ids,
};

/// Source bytes tokenized at first for every token needed; four times more each time they turn out too few.
const BYTES_PER_TOKEN: usize = 16;

/// A text up to this many bytes is always tokenized whole: it takes a few seconds.
const ALWAYS_WHOLE: usize = 4 << 20;

/// Draws `count` sequences of exactly `seq_len` tokens from a text.
///
/// Documents are tokenized as inference sees them: with the tokenizer's own marks, an EOS after each where the model
/// names one, conversations through the chat template. Every sequence starts as a prompt does, with the tokenizer's
/// BOS if it has one. No token is used twice.
///
/// All documents get an equal say: the allowance of tokens for each is the smallest that fills `count` sequences, though
/// at least one sequence. A document longer than one sequence gives whole sequences, at random places spread evenly over
/// it; shorter ones are joined in random order. The windows are then shuffled and the first `count` taken.
///
/// The same text, tokenizer, lengths and seed give the same ids on every machine: the generator is SplitMix64
/// (Steele, Lea, Flood 2014), written out below, and the shuffle Fisher and Yates's.
///
/// A text with fewer windows than `count` gives those it has; one with fewer tokens than `seq_len` is an error. So are a
/// text without documents, one of whose records more than half are blank or were left out, and one whose every conversation the template
/// refuses or writes nothing of. Conversations for a model without a
/// template are read as plain text, turn after turn.
pub fn select(
    text: &Text,
    tokenizer: &Tokenizer,
    chat: Option<&ChatTemplate>,
    count: usize,
    seq_len: usize,
    seed: u64,
) -> Result<Samples, SampleError> {
    let least = tokenizer.prefix().len() + 1;
    if count == 0 {
        return Err(SampleError::Length("0 samples calibrate nothing; give --samples 1 or more".to_owned()));
    }
    if seq_len < least {
        return Err(SampleError::Length(format!(
            "a sequence of {seq_len} tokens holds no text; give --seq-len {least} or more"
        )));
    }
    let documents = usable(text)?;
    // Each stage has a generator of its own, so that none depends on how often another one drew.
    let mut random = SplitMix64(seed);
    let [places, cuts, mut last] = [(); 3].map(|()| SplitMix64(random.next()));
    let mut order: Vec<usize> = (0..documents.len()).collect();
    random.shuffle(&mut order);
    let Renderings { mut rendered, tally } = Renderings::of(order.iter().map(|index| documents[*index]), chat)?;
    if let (true, Some(chat)) = (rendered.is_empty(), chat) {
        return Err(tally.nothing_left(&text.name, documents.len(), chat));
    }

    // One window more for the partial one that is dropped, and the marks repeated at the head of each.
    let needed = count.saturating_add(1).saturating_mul(seq_len.saturating_add(tokenizer.prefix().len()));
    rendered.retain(|one| !one.text.is_empty());
    if rendered.is_empty() {
        return Err(SampleError::Empty { name: text.name.clone() });
    }
    let wanted = Wanted { count, seq_len, needed };
    let (mut windows, tokens) = enough_windows(&rendered, tokenizer, wanted, places, cuts)?;
    if windows.is_empty() {
        return Err(SampleError::TooShort { name: text.name.clone(), found: tokens, needed: seq_len });
    }
    last.shuffle(&mut windows);
    windows.truncate(count);
    let source = SampleSource {
        name: text.name.clone(),
        text_sha256: text.sha256.clone(),
        tokens_sha256: sha256_ids(&windows),
        documents: documents.len(),
        refused: tally.refused,
        refusal: tally.refusal.map(|error| error.to_string()),
        unwritten: tally.unwritten,
        templated: tally.templated,
        untemplated: tally.untemplated,
        tokens: windows.len() * seq_len,
        sequences: windows.len(),
        requested: count,
        seq_len,
        seed,
    };
    Ok(Samples { sequences: windows, source })
}

/// The documents of a text that say something. Fails where none does, and where more than half of the records were left out.
fn usable(text: &Text) -> Result<Vec<&Document>, SampleError> {
    let documents: Vec<&Document> = text.documents.iter().filter(|document| !document.is_blank()).collect();
    if documents.is_empty() {
        return Err(SampleError::Empty { name: text.name.clone() });
    }
    if let Tally { found, lost, blank: Some(LeftOut { place, count, .. }) } = &text.tally
        && 2 * (lost + count) > *found
    {
        return Err(SampleError::Record {
            name: text.name.clone(),
            place: place.clone(),
            problem: format!(
                "the text is blank; {} of {found} records cannot be used, and fewer than half may be left out: mend them, or take them out \
                 of the file",
                lost + count
            ),
        });
    }
    Ok(documents)
}

/// Documents as strings, in the order in which they were asked for, and what became of the others.
struct Renderings<'a> {
    rendered: Vec<Rendered<'a>>,
    tally: RenderTally,
}

/// How many documents went through the chat template, and how many it did not take.
#[derive(Default)]
struct RenderTally {
    /// Conversations that the template wrote.
    templated: usize,
    /// Conversations that are read as plain text, for the model has no template.
    untemplated: usize,
    /// Conversations of which the template wrote nothing.
    unwritten: usize,
    /// Conversations that the template refused.
    refused: usize,
    /// Why it refused the first of these.
    refusal: Option<SampleError>,
}

impl<'a> Renderings<'a> {
    /// Renders documents one after the other. Fails for a template that does not end.
    fn of(
        documents: impl Iterator<Item = &'a Document>,
        chat: Option<&ChatTemplate>,
    ) -> Result<Renderings<'a>, SampleError> {
        let (mut rendered, mut tally) = (Vec::new(), RenderTally::default());
        for document in documents {
            match render(document, chat) {
                Ok(one) if one.marked && !is_written(document, &one.text) => tally.unwritten += 1,
                Ok(one) => {
                    tally.templated += usize::from(one.marked);
                    tally.untemplated += usize::from(!one.marked && !matches!(document, Document::Plain(_)));
                    rendered.push(one);
                }
                Err(error @ SampleError::Endless { .. }) => return Err(error),
                Err(error) => {
                    tally.refused += 1;
                    tally.refusal.get_or_insert(error);
                }
            }
        }
        Ok(Renderings { rendered, tally })
    }
}

impl RenderTally {
    /// Why a text of so many documents has none that can be used.
    fn nothing_left(&self, name: &str, documents: usize, chat: &ChatTemplate) -> SampleError {
        let RenderTally { refused, refusal, unwritten, .. } = self;
        let problem = match (refusal, unwritten) {
            (Some(SampleError::Template { problem, .. }), 0) => {
                format!("all {refused} conversations of {name} are refused: {problem}")
            }
            (_, 0) => return SampleError::Empty { name: name.to_owned() },
            (refusal, _) => {
                let others = match refusal {
                    Some(SampleError::Template { problem, .. }) => format!(" and refuses {refused}: {problem}"),
                    _ => String::new(),
                };
                format!(
                    "it writes nothing of what is said in {unwritten} of the {documents} conversations of {name}{others}; are their roles \
                     those it is written for?"
                )
            }
        };
        SampleError::Template { file: chat.file().to_owned(), problem }
    }
}

/// The sequences that are asked for.
#[derive(Clone, Copy)]
struct Wanted {
    count: usize,
    /// Tokens of each.
    seq_len: usize,
    /// Tokens of all, with what is lost at the ends.
    needed: usize,
}

/// Windows of a text of which no more is tokenized than gives enough of them, and how many tokens that were.
fn enough_windows(
    rendered: &[Rendered<'_>],
    tokenizer: &Tokenizer,
    Wanted { count, seq_len, needed }: Wanted,
    places: SplitMix64,
    cuts: SplitMix64,
) -> Result<(Vec<Vec<u32>>, usize), SampleError> {
    let total: usize = rendered.iter().map(|one| one.text.len()).sum();
    let mut budget = needed.saturating_mul(BYTES_PER_TOKEN).max(ALWAYS_WHOLE);
    loop {
        let whole = budget >= total;
        let documents = tokenize(rendered, tokenizer, if whole { None } else { Some(budget) }, seq_len, places)?;
        let tokens: usize = documents.iter().map(|document| document.ids.len()).sum();
        let windows = cut(&documents, tokenizer.prefix(), needed, seq_len, cuts);
        if whole || windows.len() >= count {
            return Ok((windows, tokens));
        }
        budget = budget.saturating_mul(4);
    }
}

/// How many ids of an evaluation text its windows take: no more need be known of it.
pub fn needed(context: usize, limit: Option<usize>) -> usize {
    limit.map_or(usize::MAX, |limit| limit.saturating_mul(context))
}

/// Non-overlapping windows of `context` tokens of an evaluation text tokenized once; the last, partial one is dropped.
///
/// `limit` keeps only the first windows. Protocol `papers` passes no `bos`: what the tokenizer put at the very start of
/// the text stays, and nothing is added. Protocol `llama.cpp` passes the BOS that the model adds, if it adds one, and it
/// takes the place of the first token of every window. `name` is the text's, for messages. Fails when not even one window is full.
pub fn windows(
    name: &str,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    bos: Option<u32>,
) -> Result<Vec<Vec<u32>>, SampleError> {
    if context < 2 {
        return Err(SampleError::Length(format!("a window of {context} tokens predicts nothing")));
    }
    if limit == Some(0) {
        return Err(SampleError::Length("0 windows measure nothing".to_owned()));
    }
    let windows: Vec<Vec<u32>> = ids
        .chunks_exact(context)
        .take(limit.unwrap_or(usize::MAX))
        .map(|window| {
            let mut window = window.to_vec();
            if let Some(bos) = bos {
                window[0] = bos;
            }
            window
        })
        .collect();
    if windows.is_empty() {
        return Err(SampleError::NoWindow { name: name.to_owned(), found: ids.len(), context });
    }
    Ok(windows)
}

/// A document as one string; `marked` when the chat template wrote it, special tokens and all.
struct Rendered<'a> {
    text: Cow<'a, str>,
    marked: bool,
}

fn render<'a>(document: &'a Document, chat: Option<&ChatTemplate>) -> Result<Rendered<'a>, SampleError> {
    let plain = |text: String| Ok(Rendered { text: Cow::Owned(text), marked: false });
    let marked = |text: String| Ok(Rendered { text: Cow::Owned(text), marked: true });
    match (document, chat) {
        (Document::Plain(text), _) => Ok(Rendered { text: Cow::Borrowed(text), marked: false }),
        (Document::Chat { messages, tools }, Some(chat)) => marked(chat.render(messages, tools)?),
        (Document::Chat { messages, .. }, None) => {
            plain(messages.iter().map(Message::text).collect::<Vec<_>>().join("\n\n"))
        }
        (Document::Pair { prompt, completion }, Some(chat)) => {
            let turns = [Message::new("user", prompt.as_str()), Message::new("assistant", completion.as_str())];
            marked(chat.render(&turns, &[])?)
        }
        (Document::Pair { prompt, completion }, None) => {
            let joined = prompt.ends_with(char::is_whitespace) || completion.starts_with(char::is_whitespace);
            plain([prompt.as_str(), if joined { "" } else { "\n" }, completion.as_str()].concat())
        }
    }
}

/// Whether a rendering holds any word of what is said; true where nothing is said, as in calls alone, and something is rendered.
fn is_written(document: &Document, rendered: &str) -> bool {
    let said: Vec<Cow<'_, str>> = match document {
        Document::Plain(text) => vec![text.into()],
        Document::Pair { prompt, completion } => vec![prompt.into(), completion.into()],
        Document::Chat { messages, .. } => messages.iter().map(Message::text).collect(),
    };
    let mut words = said.iter().flat_map(|text| text.split_whitespace()).peekable();
    !rendered.trim().is_empty() && (words.peek().is_none() || words.any(|word| rendered.contains(word)))
}

/// A tokenized document, with every mark that inference puts around it.
struct Tokenized {
    ids: Vec<u32>,
    /// Whether `ids` begins in the middle of the document.
    excerpt: bool,
}

/// Tokenizes the documents, or no more than about `budget` bytes of them, each getting an equal share.
///
/// Of a document longer than its share it takes excerpts, each long enough for a sequence, spread evenly over it.
fn tokenize(
    documents: &[Rendered<'_>],
    tokenizer: &Tokenizer,
    budget: Option<usize>,
    seq_len: usize,
    mut random: SplitMix64,
) -> Result<Vec<Tokenized>, SampleError> {
    let excerpt = seq_len.saturating_mul(BYTES_PER_TOKEN).max(4096);
    let budget = budget.unwrap_or(usize::MAX);
    let share = allowance(documents.iter().map(|one| one.text.len()), budget).max(excerpt);
    let mut spent = 0;
    let mut jobs: Vec<(&str, bool, bool, bool)> = Vec::with_capacity(documents.len());
    for one in documents {
        if spent >= budget {
            break;
        }
        let text: &str = &one.text;
        let pieces = if text.len() <= share { 1 } else { share / excerpt };
        for piece in 0..pieces {
            let (mut start, mut end) = (text.len() * piece / pieces, text.len() * (piece + 1) / pieces);
            if text.len() > share {
                start += random.below(end - start - excerpt + 1);
                end = start + excerpt;
                (start, end) = (floor_char(text, start), floor_char(text, end));
            }
            spent += end - start;
            jobs.push((&text[start..end], one.marked, start > 0, end < text.len()));
        }
    }
    jobs.into_par_iter()
        .map(|(piece, marked, excerpt, cut)| {
            let body = tokenizer.encode(piece, false)?;
            let before = if marked || excerpt { &[] } else { tokenizer.prefix() };
            let after = if marked || cut { &[] } else { tokenizer.suffix() };
            let mut ids = [before, &body, after].concat();
            if let (Some(eos), false) = (tokenizer.eos(), marked || cut)
                && ids.last() != Some(&eos)
            {
                ids.push(eos);
            }
            Ok(Tokenized { ids, excerpt })
        })
        .collect()
}

/// Cuts documents into sequences of exactly `seq_len` ids, as [`select`] says; all windows there are, in no fair order.
fn cut(
    documents: &[Tokenized],
    prefix: &[u32],
    needed: usize,
    seq_len: usize,
    mut random: SplitMix64,
) -> Vec<Vec<u32>> {
    let allowance = allowance(documents.iter().map(|document| document.ids.len()), needed).max(seq_len);
    let mut windows = Vec::new();
    // Short documents and what is left of long ones: ids, and where among them a document starts.
    let mut pool: Vec<u32> = Vec::new();
    let mut starts: Vec<usize> = Vec::new();
    let mut add = |ids: &[u32], excerpt: bool| {
        if !excerpt {
            starts.push(pool.len());
        }
        pool.extend_from_slice(ids);
    };
    for document in documents {
        let ids = &document.ids;
        let whole = ids.len() / seq_len;
        let wanted = allowance.div_ceil(seq_len).min(whole);
        for window in 0..wanted {
            // One window in each of `wanted` equal stretches, at a random place; no two overlap.
            let (from, to) = (ids.len() * window / wanted, ids.len() * (window + 1) / wanted);
            let at = if wanted == whole { window * seq_len } else { from + random.below(to - from - seq_len + 1) };
            windows.push(if at == 0 && !document.excerpt {
                ids[..seq_len].to_vec()
            } else {
                [prefix, &ids[at..at + seq_len - prefix.len()]].concat()
            });
        }
        if wanted == whole {
            add(&ids[whole * seq_len..], whole > 0 || document.excerpt);
        }
    }
    let mut at = 0;
    let mut start = starts.iter().peekable();
    loop {
        while start.next_if(|&&start| start < at).is_some() {}
        let fresh = start.peek() == Some(&&at);
        let lead: &[u32] = if fresh { &[] } else { prefix };
        let end = at + seq_len - lead.len();
        if end > pool.len() {
            return windows;
        }
        windows.push([lead, &pool[at..end]].concat());
        at = end;
    }
}

/// The smallest cap for which items of these lengths, each cut to the cap, together reach `needed`; the longest length
/// where even the whole does not.
fn allowance(lengths: impl Iterator<Item = usize>, needed: usize) -> usize {
    let mut lengths: Vec<usize> = lengths.collect();
    lengths.sort_unstable();
    let mut left = needed;
    for (index, &length) in lengths.iter().enumerate() {
        let sharing = lengths.len() - index;
        if length.saturating_mul(sharing) >= left {
            return left.div_ceil(sharing);
        }
        left -= length;
    }
    lengths.last().copied().unwrap_or(0)
}

/// The nearest character boundary at or before `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// SplitMix64: a 64-bit counter and a mixing function; a copy continues by itself.
#[derive(Clone, Copy)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0; the bias of the multiplication is below `bound` / 2⁶⁴.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
pub(super) use tests::words;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::samples::{TokenizerConfig, parse_txt};

    /// One token a word: `w0`…`w9999`, BOS 10000 before every text, EOS 10001.
    pub fn words(bos: bool) -> Tokenizer {
        let mut vocab: serde_json::Map<String, serde_json::Value> =
            (0..10_000).map(|id| (format!("w{id}"), id.into())).collect();
        vocab.insert("<s>".to_owned(), 10_000.into());
        vocab.insert("</s>".to_owned(), 10_001.into());
        let token = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let a = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let s = serde_json::json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [token(10_000, "<s>"), token(10_001, "</s>")],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
            "post_processor": if bos {
                serde_json::json!({"type": "TemplateProcessing", "single": [s, a], "pair": [a, a],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [10_000], "tokens": ["<s>"]}}})
            } else { serde_json::Value::Null },
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
        });
        let config = TokenizerConfig {
            bos_token: Some("<s>".to_owned()),
            eos_token: Some("</s>".to_owned()),
            ..TokenizerConfig::default()
        };
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap().with_config(&config)
    }

    fn document(words: std::ops::Range<u32>) -> String {
        words.map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ")
    }

    fn text(documents: &[std::ops::Range<u32>]) -> Text {
        let documents: Vec<String> = documents.iter().cloned().map(document).collect();
        parse_txt("t.txt", &documents.join("\n<|document|>\n"))
    }

    fn single(words: std::ops::Range<u32>) -> Text {
        parse_txt("t.txt", &document(words))
    }

    #[test]
    fn splitmix_gives_the_published_numbers() {
        // First outputs for seed 1234567 of the reference implementation by Sebastiano Vigna.
        let mut random = SplitMix64(1_234_567);
        assert_eq!(
            [random.next(), random.next(), random.next()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        let mut items: Vec<u32> = (0..100).collect();
        random.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn allowance_fills_the_need_with_equal_shares() {
        for lengths in [vec![], vec![7], vec![0, 0, 5], vec![1, 2, 3, 4, 100], vec![10; 10], vec![3, 1000, 1000]] {
            for needed in [0, 1, 5, 9, 10, 11, 50, 99, 100, 110, 5000] {
                let cap = allowance(lengths.iter().copied(), needed);
                let reached = |cap: usize| lengths.iter().map(|&length| length.min(cap)).sum::<usize>();
                let longest = lengths.iter().copied().max().unwrap_or(0);
                // The textbook version: try every cap.
                let expected = (0..=longest).find(|&cap| reached(cap) >= needed).unwrap_or(longest);
                assert_eq!(cap, expected, "{lengths:?}, {needed}");
            }
        }
    }

    #[test]
    fn sequences_are_full_start_with_bos_and_repeat_nothing() {
        for bos in [false, true] {
            let tokenizer = words(bos);
            assert_eq!(tokenizer.added_bos(), bos.then_some(10_000));
            let text = text(&[0..3000, 3000..3010, 3010..3500, 4000..4001, 5000..9000]);
            for (count, seq_len) in [(1, 16), (20, 64), (100, 64), (1000, 64), (3, 1000), (2, 4005)] {
                let samples = select(&text, &tokenizer, None, count, seq_len, 1).unwrap();
                assert_eq!(samples.source.sequences, samples.sequences.len());
                assert_eq!(samples.source.requested, count);
                assert!(samples.sequences.len() <= count && !samples.sequences.is_empty());
                if count * (seq_len + 2) + 3 * seq_len < 7000 {
                    assert_eq!(samples.sequences.len(), count, "{bos}, {count} of {seq_len}");
                }
                let mut seen = HashSet::new();
                for sequence in &samples.sequences {
                    assert_eq!(sequence.len(), seq_len);
                    if bos {
                        assert_eq!(sequence[0], 10_000);
                    }
                    for pair in sequence.windows(2) {
                        // Words follow each other as in the text, but for marks and ends of documents.
                        let marks = pair.iter().any(|&id| id >= 10_000);
                        assert!(marks || pair[1] == pair[0] + 1, "{pair:?}");
                    }
                    for &id in sequence.iter().filter(|&&id| id < 10_000) {
                        assert!(seen.insert(id), "word {id} twice in {count} of {seq_len}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_text_that_runs_out_is_used_almost_whole() {
        let text = text(&[0..1000, 1000..1050, 2000..2900]);
        let samples = select(&text, &words(false), None, 1000, 50, 7).unwrap();
        // 1950 words and three EOS make 39 windows.
        assert_eq!((samples.sequences.len(), samples.source.requested), (39, 1000));
        assert_eq!(samples.source.tokens, 39 * 50);
    }

    #[test]
    fn one_long_document_does_not_drown_the_others() {
        // 9000 words of one book beside nine documents of 100.
        let documents: Vec<_> =
            std::iter::once(0..9000).chain((90..99).map(|hundred| hundred * 100..(hundred + 1) * 100)).collect();
        let samples = select(&text(&documents), &words(false), None, 10, 100, 3).unwrap();
        let book = samples.sequences.iter().flatten().filter(|&&id| id < 9000).count();
        let others = samples.sequences.iter().flatten().filter(|&&id| (9000..9900).contains(&id)).count();
        assert_eq!(samples.sequences.len(), 10);
        assert!(others >= 6 * 100, "{others} tokens of the short documents, {book} of the book");
        // And a long text alone is read from all over.
        let alone = select(&single(0..9000), &words(false), None, 9, 100, 3).unwrap();
        let stretches: HashSet<u32> = alone.sequences.iter().map(|sequence| sequence[50] / 1000).collect();
        assert!(stretches.len() >= 7, "{stretches:?}");
    }

    #[test]
    fn the_seed_decides_and_threads_do_not() {
        let text = text(&[0..3000, 3000..3010, 3010..3500, 5000..9000]);
        let tokenizer = words(true);
        let run = |seed| select(&text, &tokenizer, None, 20, 64, seed).unwrap();
        let first = run(0);
        assert_eq!(first, run(0));
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| run(0));
        assert_eq!(first, alone);
        assert_ne!(first.source.tokens_sha256, run(1).source.tokens_sha256);
        // Pinned: a change here changes every user's output.
        assert_eq!(first.source.tokens_sha256, "759c9a0a1cf9cfb4e681078580c9d8d78169099ce63faeadebf3c76398a0733b");
    }

    #[test]
    fn only_the_needed_part_of_a_huge_text_is_tokenized() {
        let text = text(&[0..5000, 5000..5010, 5010..5500, 6000..9999]);
        let tokenizer = words(false);
        let documents: Vec<Rendered<'_>> = text.documents.iter().map(|one| render(one, None).unwrap()).collect();
        let all: usize = documents.iter().map(|one| one.text.len()).sum();
        let some = tokenize(&documents, &tokenizer, Some(20_000), 32, SplitMix64(1)).unwrap();
        let tokens: usize = some.iter().map(|one| one.ids.len()).sum();
        assert!(tokens * 15 < all && tokens > 2000, "{tokens} tokens of {all} bytes");
        // Two excerpts of each of the two long documents, or one where the other half begins the document.
        assert!(some.iter().filter(|one| one.excerpt).count() >= 3);
        for one in some.iter().filter(|one| one.excerpt) {
            // The first and last word may be cut in two.
            let inner = &one.ids[1..one.ids.len() - 1];
            assert!(inner.windows(2).all(|pair| pair[1] == pair[0] + 1));
        }
    }

    #[test]
    fn a_text_of_many_megabytes_is_sampled_in_all_its_parts() {
        // Ten parts of 1.2 MB, each of one word.
        let text: String = (0..10).map(|part| format!("w{part} ").repeat(400_000)).collect();
        let text = parse_txt("big.txt", &text);
        let samples = select(&text, &words(true), None, 20, 128, 0).unwrap();
        assert_eq!(samples.sequences.len(), 20);
        let parts: HashSet<u32> = samples.sequences.iter().map(|sequence| sequence[64]).collect();
        assert!(parts.len() >= 6, "{parts:?}");
        assert!(samples.sequences.iter().all(|sequence| sequence[0] == 10_000));
    }

    #[test]
    fn conversations_go_through_the_template() {
        let chat = ChatTemplate::new(
            "t.jinja",
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %} {{ m.content }} {{ eos_token }}{% endfor %}",
            Some("<s>"),
            Some("</s>"),
        )
        .unwrap();
        let turn = |role: &str, content: &str| Message::new(role, content);
        let talk = |messages| Document::Chat { messages, tools: Vec::new() };
        let mut text = single(0..1);
        text.documents = vec![
            talk(vec![turn("user", "w1"), turn("assistant", "w2 w3")]),
            Document::Pair { prompt: "w4".to_owned(), completion: "w5".to_owned() },
            talk(vec![turn("system", "w6"), turn("user", "w7")]),
        ];
        let tokenizer = words(true);
        let samples = select(&text, &tokenizer, Some(&chat), 1, 11, 0).unwrap();
        let (a, b) = (vec![10_000, 1, 10_001, 2, 3, 10_001], vec![10_000, 4, 10_001, 5, 10_001]);
        // Either order, one BOS each, no EOS beyond the template's own.
        let joined = [[&a[..], &b[..]].concat(), [&b[..], &a[..]].concat()];
        assert!(joined.contains(&samples.sequences[0]), "{:?}", samples.sequences);
        assert_eq!((samples.source.refused, samples.source.templated, samples.source.documents), (1, 2, 3));
        assert_eq!(samples.source.refusal.as_deref(), Some("t.jinja: chat template: no system (line 1)"));

        text.documents.drain(..2);
        let error = select(&text, &tokenizer, Some(&chat), 1, 4, 0).unwrap_err().to_string();
        assert!(error.contains("all 1 conversations of t.txt are refused") && error.contains("no system"), "{error}");
        // Without a template it is text like any other: <s> w6 w7 </s>.
        let plain = select(&text, &tokenizer, None, 1, 4, 0).unwrap();
        assert_eq!(plain.sequences, [vec![10_000, 6, 7, 10_001]]);
        assert_eq!((plain.source.refused, plain.source.templated, plain.source.untemplated), (0, 0, 1));
    }

    #[test]
    fn a_template_that_writes_nothing_is_named() {
        let chat = |source: &str| ChatTemplate::new("t.jinja", source, Some("<s>"), None).unwrap();
        let silent = [
            chat(" "),
            chat("{{ bos_token }}"),
            chat("{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}<s>"),
        ];
        let one = |role: &str| Document::Chat { messages: vec![Message::new(role, "w1 w2 w3")], tools: Vec::new() };
        let mut text = single(0..1);
        text.documents = vec![one("user"), one("user")];
        for chat in &silent {
            let error = select(&text, &words(true), Some(chat), 1, 4, 0).unwrap_err().to_string();
            assert!(
                error.starts_with(
                    "t.jinja: chat template: it writes nothing of what is said in 2 of the 2 conversations of t.txt"
                ),
                "{error}"
            );
        }
        // One that it writes is enough, and the others are counted.
        text.documents.push(one("human"));
        let source = select(&text, &words(true), Some(&silent[2]), 1, 3, 0).unwrap().source;
        assert_eq!((source.unwritten, source.templated, source.refused), (2, 1, 0));
        // Calls have no words of their own.
        let mut call = Message::new("assistant", "");
        call.extra.insert("tool_calls".to_owned(), serde_json::json!([]));
        assert!(is_written(&Document::Chat { messages: vec![call], tools: Vec::new() }, "<call>"));
    }

    #[test]
    fn short_and_empty_texts_say_what_would_fit() {
        let tokenizer = words(true);
        let run = |text: &Text, count, seq_len| select(text, &tokenizer, None, count, seq_len, 0);
        let short = text(&[0..20, 30..40]);
        // Two BOS, two EOS, thirty words.
        let error = run(&short, 4, 64).unwrap_err().to_string();
        assert_eq!(error, "t.txt: 34 tokens do not fill one sequence of 64; give more text, or --seq-len 34 or less");
        assert_eq!(run(&short, 4, 34).unwrap().sequences.len(), 1);
        let empty = parse_txt("e.txt", "  \n");
        assert_eq!(run(&empty, 1, 8).unwrap_err().to_string(), "e.txt: the text is empty");
        assert!(run(&short, 0, 8).unwrap_err().to_string().contains("--samples 1"));
        assert!(run(&short, 1, 1).unwrap_err().to_string().contains("--seq-len 2"));
        assert!(run(&short, usize::MAX, 8).is_ok());
        assert!(run(&short, 1, usize::MAX).is_err());
    }

    #[test]
    fn windows_follow_their_protocol() {
        let ids: Vec<u32> = (0..23).collect();
        let papers = windows("t.txt", &ids, 5, None, None).unwrap();
        assert_eq!(papers.concat(), (0..20).collect::<Vec<u32>>());
        assert_eq!(windows("t.txt", &ids, 5, Some(2), None).unwrap(), papers[..2]);
        let llama = windows("t.txt", &ids, 5, None, Some(99)).unwrap();
        assert!(llama.iter().zip(&papers).all(|(l, p)| l[0] == 99 && l[1..] == p[1..]));
        let error = windows("t.txt", &ids, 24, None, None).unwrap_err().to_string();
        assert!(error.contains("23 tokens") && error.contains("--context 23"), "{error}");
        assert!(windows("t.txt", &ids, 1, None, None).is_err() && windows("t.txt", &ids, 5, Some(0), None).is_err());
        assert!(windows("t.txt", &[], 5, None, None).is_err());
    }
}
