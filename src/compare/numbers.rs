//! Shares, histograms, and what no other row beats.

use serde::{Deserialize, Serialize};

/// A count as a share of another; 0 of nothing.
pub fn share(count: usize, of: usize) -> f64 {
    count as f64 / of.max(1) as f64
}

/// The standard error of a share of so many, taken as independent.
pub fn share_stderr(share: f64, of: usize) -> f64 {
    (share * (1.0 - share) / of.max(1) as f64).sqrt()
}

/// How divergences are distributed: counts in bins of equal width of the logarithm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Histogram {
    /// Below the first bin.
    pub below: usize,
    /// In each bin.
    pub counts: Vec<usize>,
    /// At or above the end of the last one.
    pub above: usize,
}

impl Histogram {
    /// The decimal logarithms at which the bins begin and end, in nats.
    #[cfg_attr(doc, doc(hidden))]
    pub const RANGE: [i32; 2] = [-6, 1];
    /// Bins of a decade.
    #[cfg_attr(doc, doc(hidden))]
    pub const PER_DECADE: i32 = 4;

    /// That of some divergences.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of(values: &[f64]) -> Histogram {
        let bins = (Self::RANGE[1] - Self::RANGE[0]) * Self::PER_DECADE;
        let mut histogram = Histogram { below: 0, counts: vec![0; bins as usize], above: 0 };
        for value in values {
            let place = (value.max(0.0).log10() - f64::from(Self::RANGE[0])) * f64::from(Self::PER_DECADE);
            match place.floor() {
                place if place < 0.0 => histogram.below += 1,
                place if place >= f64::from(bins) => histogram.above += 1,
                place => histogram.counts[place as usize] += 1,
            }
        }
        histogram
    }
}

/// Which of some pairs (smaller is better, both) no other one beats; none where there is no pair.
pub fn pareto(pairs: &[Option<(f64, f64)>]) -> Vec<bool> {
    let beats = |a: (f64, f64), b: (f64, f64)| a.0 <= b.0 && a.1 <= b.1 && a != b;
    pairs.iter().map(|own| own.is_some_and(|own| !pairs.iter().flatten().any(|other| beats(*other, own)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_textbook() {
        assert_eq!((share(1, 4), share(0, 0), share_stderr(0.5, 25)), (0.25, 0.0, 0.1));
    }

    #[test]
    fn every_divergence_is_in_one_bin() {
        let found = Histogram::of(&[0.0, -1e-12, 9e-7, 1.01e-6, 0.011, 9.99, 10.0, 40.0]);
        assert_eq!((found.below, found.above, found.counts.len()), (3, 2, 28));
        assert_eq!((found.counts[0], found.counts[16], found.counts[27]), (1, 1, 1));
        assert_eq!(found.counts.iter().sum::<usize>(), 3);
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let pairs = [Some((4.0, 0.3)), Some((5.0, 0.1)), Some((5.0, 0.2)), None, Some((8.0, 0.1)), Some((4.0, 0.3))];
        assert_eq!(pareto(&pairs), [true, true, false, false, false, true]);
    }
}
