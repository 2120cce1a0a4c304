//! From when to when the values that are kept, and the weights, are needed.

use super::{Kept, Kind, Program, Value};

/// How long everything of a program is needed.
///
/// Time goes by steps: at `2 · n` what is pending of the values that are kept is computed before operation `n`, and at `2 · n + 1` the
/// operation is done itself.
#[derive(Clone, Debug)]
pub struct Lifetimes {
    /// Whether anybody needs what an operation makes.
    pub needed: Vec<bool>,
    /// When a value that is kept is there first; `None` for one that is not kept.
    pub from: Vec<Option<usize>>,
    /// When a value is read last; 0 for one that nobody reads.
    pub until: Vec<usize>,
    /// When the weights of an operation are used last.
    pub weights_until: Vec<usize>,
    /// Whether keys and values are there at the end, for later blocks.
    pub leaves: bool,
}

impl Lifetimes {
    /// Those of a program of whose last value somebody makes use, or nobody: then only the inputs of its linears are.
    pub fn of(program: &Program<'_>, needs_output: bool) -> Lifetimes {
        let Program { values, operations, .. } = program;
        let mut wanted = vec![false; values.len()];
        if let Some(last) = wanted.last_mut() {
            *last = needs_output;
        }
        let mut lives = Lifetimes {
            needed: vec![false; operations.len()],
            from: vec![None; values.len()],
            until: vec![0; values.len()],
            weights_until: vec![0; operations.len()],
            leaves: needs_output && program.leaves.is_some(),
        };
        if let Some((_, left)) = program.leaves.as_ref().filter(|_| needs_output) {
            for value in left.iter().copied() {
                wanted[value] = true;
                lives.until[value] = 2 * operations.len() + 1;
            }
        }
        // The next operation at which something happens.
        let mut next = operations.len();
        for (at, operation) in operations.iter().enumerate().rev() {
            let seen = matches!(operation.kind, Kind::Linear { fixed: false, .. });
            let needed = operation.makes.iter().any(|value| wanted[*value]);
            let adds = operation.kind.adds();
            // When its values are computed last.
            let last = operation.makes.iter().filter(|value| wanted[**value]).map(|value| {
                match (adds, values[*value].kept, values[*value].expert) {
                    (true, ..) => 2 * at + 1,
                    (_, Kept::Always, None) => 2 * next,
                    // Those who look at its inputs may ask for other tokens of an expert.
                    (_, Kept::Always, Some(_)) => 2 * next + 1,
                    _ => lives.until[*value],
                }
            });
            let last = last.max().unwrap_or(0);
            lives.needed[at] = needed;
            lives.weights_until[at] = last;
            for value in &operation.makes {
                lives.from[*value] = match (wanted[*value], values[*value].kept) {
                    (false, _) | (_, Kept::Never) => None,
                    // In the place of what it was added to.
                    _ if adds => Some(2 * at + 2),
                    // From the first look at it.
                    (_, Kept::Room) => Some(2 * next + 1),
                    (_, Kept::Always) => Some(2 * next),
                };
            }
            if needed || seen {
                let read = if seen { last.max(2 * at + 1) } else { last };
                for value in &operation.reads {
                    wanted[*value] = true;
                    lives.until[*value] = lives.until[*value].max(read);
                }
            }
            if operation.kind.is_step() {
                next = at;
            }
        }
        // A stream that is still read when something is added to it is copied.
        for (at, operation) in operations.iter().enumerate().filter(|(_, o)| o.kind.makes_stream()) {
            let stream = operation.reads[0];
            let copied = lives.needed[at] && lives.until[stream] > 2 * at + 1;
            lives.from[stream] = copied.then_some(2 * at + 1);
        }
        lives
    }

    /// The most that is kept at a time, of what each kept value counts.
    pub fn most(&self, program: &Program<'_>, count: impl Fn(&Value) -> u64) -> u64 {
        let mut changes = vec![0i128; 2 * program.operations.len() + 3];
        for ((value, from), until) in program.values.iter().zip(&self.from).zip(&self.until) {
            let Some(from) = from else { continue };
            changes[*from] += i128::from(count(value));
            changes[(until + 1).max(*from)] -= i128::from(count(value));
        }
        let (mut now, mut most) = (0, 0);
        for change in changes {
            now += change;
            most = most.max(now);
        }
        u64::try_from(most).unwrap_or(u64::MAX)
    }
}
