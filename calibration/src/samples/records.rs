//! Records of a file as they are read: what they hold, which were left out and why, and what was guessed.

use serde_json::Value;

use super::record::{self, Guess, Record};
use super::{Document, LeftOut, SampleError, Tally, Text};

/// Records as they are read, those that hold nothing left out and counted.
#[derive(Default)]
pub(super) struct Records {
    documents: Vec<Document>,
    found: usize,
    left_out: Vec<LeftOut>,
    blank: Option<LeftOut>,
    guesses: Vec<Guessed>,
    /// What there is to say of the file as a whole.
    pub notes: Vec<String>,
}

/// Records about which the same was guessed.
struct Guessed {
    guess: Guess,
    /// The first of them.
    place: String,
    count: usize,
}

impl Records {
    /// Takes the record at a place such as `line 3`.
    pub fn add(&mut self, place: impl Fn() -> String, record: Result<Value, String>) {
        self.found += 1;
        match record.and_then(|record| record::read(&record)) {
            Ok(Record { document, guesses }) => {
                if document.is_blank() {
                    match &mut self.blank {
                        Some(blank) => blank.count += 1,
                        None => self.blank = Some(LeftOut { place: place(), problem: String::new(), count: 1 }),
                    }
                }
                self.documents.push(document);
                guesses.into_iter().for_each(|guess| self.guess(&place, guess));
            }
            Err(problem) => self.leave_out(place, problem),
        }
    }

    /// Notes what was guessed of the record at a place.
    pub fn guess(&mut self, place: impl Fn() -> String, guess: Guess) {
        match self.guesses.iter_mut().find(|known| known.guess.is_of_kind(&guess)) {
            Some(known) => {
                known.count += 1;
                known.guess.join(guess);
            }
            None => self.guesses.push(Guessed { guess, place: place(), count: 1 }),
        }
    }

    fn leave_out(&mut self, place: impl Fn() -> String, problem: String) {
        let reason = without_numbers(&problem);
        match self.left_out.iter_mut().find(|one| without_numbers(&one.problem) == reason) {
            Some(one) => one.count += 1,
            None => self.left_out.push(LeftOut { place: place(), problem, count: 1 }),
        }
    }

    /// The text; an error where at least half of the records are of no use, or nothing at all is left.
    pub fn finish(mut self, name: &str, sha256: String) -> Result<Text, SampleError> {
        let lost: usize = self.left_out.iter().map(|one| one.count).sum();
        if let Some(first) = self.left_out.first().filter(|_| 2 * lost >= self.found) {
            let most = self.left_out.iter().max_by_key(|one| one.count).unwrap_or(first);
            // The commonest reason is the one to mend; among equals the first.
            let told = if most.count > first.count { most } else { first };
            let of = if self.found > 1 {
                format!(
                    "; {lost} of {} records cannot be used, and fewer than half may be left out: mend them, or take them out of the file",
                    self.found
                )
            } else {
                String::new()
            };
            return Err(SampleError::Record {
                name: name.to_owned(),
                place: told.place.clone(),
                problem: format!("{}{of}", told.problem),
            });
        }
        if self.documents.iter().all(Document::is_blank) {
            return Err(SampleError::Empty { name: name.to_owned() });
        }
        if lost > 0 {
            self.notes.push(format!(
                "{lost} of {} records of {name} were left out: {}",
                self.found,
                reasons(&self.left_out)
            ));
        }
        for Guessed { guess, place, count } in &self.guesses {
            let of = format!("{count} of {} records of {name}", self.found);
            self.notes.push(format!("{of} {}; the first is {place}", guess.told()));
        }
        let tally = Tally { found: self.found, lost, blank: self.blank };
        Ok(Text { name: name.to_owned(), sha256, documents: self.documents, notes: self.notes, tally })
    }
}

/// The reasons for which records were left out, the commonest first, each with the first record it is true of.
fn reasons(left_out: &[LeftOut]) -> String {
    const TOLD: usize = 4;
    let mut sorted: Vec<&LeftOut> = left_out.iter().collect();
    sorted.sort_by_key(|one| std::cmp::Reverse(one.count));
    let mut told: Vec<String> = sorted
        .iter()
        .take(TOLD)
        .map(|one| match one.count {
            1 => format!("{}: {}", one.place, one.problem),
            count => format!("{count} from {} on: {}", one.place, one.problem),
        })
        .collect();
    let others: usize = sorted.iter().skip(TOLD).map(|one| one.count).sum();
    if others > 0 {
        told.push(format!("{others} for other reasons"));
    }
    told.join("; ")
}

/// A problem without the numbers in it, so that the same one at another turn counts as the same.
fn without_numbers(problem: &str) -> String {
    problem.chars().filter(|c| !c.is_ascii_digit()).collect()
}
