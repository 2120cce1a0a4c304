//! The factorization of second moments.

use super::quantize::GRAM;
use super::{Arg, Buffer, Cuda, Matrix, Module, Operand, Pinned, Product, Real, THREADS, expect};
use crate::backend::{Factor, Quantize};
use crate::{Error, Result};

pub(super) static FACTOR: Module = Module { name: "factor", source: include_str!("../ops/factor.cu") };

/// Most rows or columns of a panel that one product takes.
const PANEL: usize = 2048;
/// Side of the blocks that `factor_block` factors.
const BLOCK: usize = 64;

/// The kernels of a factorization in double or in single precision.
struct FactorKernels {
    arrange: &'static str,
    factor_block: &'static str,
    place_panel: &'static str,
    pivots_of: &'static str,
    unit_of: &'static str,
}

impl FactorKernels {
    fn of(real: Real) -> FactorKernels {
        match real {
            Real::F64 => FactorKernels {
                arrange: "arrange",
                factor_block: "factor_block",
                place_panel: "place_panel",
                pivots_of: "pivots_of",
                unit_of: "unit_of",
            },
            _ => FactorKernels {
                arrange: "arrange_single",
                factor_block: "factor_block_single",
                place_panel: "place_panel_single",
                pivots_of: "pivots_of_single",
                unit_of: "unit_of_single",
            },
        }
    }
}

/// A matrix of single precision, and where there are such its values as sums of two of bfloat16 each.
#[derive(Clone, Copy)]
pub(super) struct Halves {
    whole: u64,
    halves: Option<[u64; 2]>,
}

impl Halves {
    pub(super) fn of(whole: &Pinned<'_>, halves: Option<&[Pinned<'_>; 2]>) -> Halves {
        Halves { whole: whole.at, halves: halves.map(|[high, low]| [high.at, low.at]) }
    }
}

pub(super) fn pinned(halves: &[Buffer; 2]) -> Result<[Pinned<'_>; 2]> {
    Ok([halves[0].pin()?, halves[1].pin()?])
}

/// Rows of a panel of a triangle: so many that products are large, so few that little lies above the diagonal.
pub(super) fn panel(n: usize) -> usize {
    n.div_ceil(4).next_multiple_of(64).clamp(128, PANEL)
}

pub(super) fn operand(at: u64, stride: usize) -> Operand {
    Operand { at, stride, transposed: false }
}

pub(super) fn transposed(at: u64, stride: usize) -> Operand {
    Operand { at, stride, transposed: true }
}

impl Cuda {
    /// On cards whose tensor cores make up for it, products of single precision are three of bfloat16: each operand's nearest, and
    /// what that leaves. Sums agree to 2⁻¹⁶ of their terms: far below what is asked of a loss, and of the errors that a sweep hands
    /// on, which are themselves of weights that were rounded to half a step.
    fn splits(&self) -> bool {
        self.rounds() && matches!(self.device().capability(), 80 | 90 | 100 | 103)
    }

    /// The values of a matrix as [`Halves`], if this card multiplies them so.
    pub(super) fn halves(&self, from: u64, count: usize) -> Result<Option<[Buffer; 2]>> {
        let halves = self.room_of_halves(count)?;
        if let Some(halves) = &halves {
            self.split(from, &pinned(halves)?, count)?;
        }
        Ok(halves)
    }

    /// Room for the [`Halves`] of so many values, if this card multiplies them so.
    pub(super) fn room_of_halves(&self, count: usize) -> Result<Option<[Buffer; 2]>> {
        match self.splits() {
            true => Ok(Some([self.buffer::<u16>(count)?, self.buffer::<u16>(count)?])),
            false => Ok(None),
        }
    }

    /// Writes values as sums of two of bfloat16 each.
    pub(super) fn split(&self, from: u64, [high, low]: &[Pinned<'_>; 2], count: usize) -> Result<()> {
        self.each(&GRAM, "split", count, &[high.arg(), low.arg(), Arg::At(from), (count as i64).into()])
    }

    /// `c ← alpha · a b + beta · c`, of operands that lie so many values from the starts of their matrices.
    pub(super) fn multiply_split(&self, product: Product, [a, b]: [Halves; 2], offsets: [usize; 2]) -> Result<()> {
        let (Some(left), Some(right)) = (a.halves, b.halves) else {
            let at = |whole: u64, offset: usize, operand: Operand| Operand { at: whole + 4 * offset as u64, ..operand };
            let (a, b) = (at(a.whole, offsets[0], product.a), at(b.whole, offsets[1], product.b));
            return self.device().product(&Product { real: Real::F32, a, b, ..product });
        };
        for (index, (left, right)) in [(0, 0), (0, 1), (1, 0)].map(|(i, k)| (left[i], right[k])).into_iter().enumerate()
        {
            let at = |half: u64, offset: usize, operand: Operand| Operand { at: half + 2 * offset as u64, ..operand };
            let (a, b) = (at(left, offsets[0], product.a), at(right, offsets[1], product.b));
            let beta = if index == 0 { product.beta } else { 1.0 };
            self.device().product(&Product { real: Real::Bf16, a, b, beta, ..product })?;
        }
        Ok(())
    }

    /// The precision of factors outside the blocks on their diagonals. Most cards have 1/32 or 1/64 as many units for doubles as for
    /// singles; there a factorization in double precision would take longer than all the rest, and GPTQ's own is in single.
    /// Damping by 5 % bounds the condition of a matrix of n columns by n / 0.05, and where single precision finds a pivot that is
    /// not positive, the solver tries again with more damping, as it does in any case.
    pub(super) fn factor_real(&self) -> Real {
        if matches!(self.device().capability(), 80 | 90 | 100) { Real::F64 } else { Real::F32 }
    }

    pub(super) fn factored(&self, gram: &Matrix, order: Vec<u32>, damp: f64) -> Result<Factor<Matrix>> {
        let n = gram.rows;
        expect("factor", "columns", n, order.len())?;
        expect("factor", "columns of the Hessian", n, gram.cols)?;
        if let Some(col) = order.iter().find(|col| **col as usize >= n) {
            let expected = format!("columns below {n}");
            return Err(Error::Shape { op: "factor", expected, found: col.to_string() });
        }
        let unit = self.matrix(n, n)?;
        let (pivots, inverse) = (self.buffer::<f64>(n)?, self.buffer::<f64>(n)?);
        let real = self.factor_real();
        let kernels = FactorKernels::of(real);
        let (a, sent) = (self.buffer::<u8>(n * n * real.bytes())?, self.send(&order)?);
        let mut diagonal = Vec::new();
        // A library passes on what is not a number, or spreads it over the whole factor, and tells of no pivot: ours then find it.
        let work = match real {
            Real::F64 => self.device().cholesky_room(a.pin()?.at, n)?,
            _ => None,
        };
        let work = work.map(|bytes| self.buffer::<u8>(bytes)).transpose()?;
        for work in work.iter().map(Some).chain([None]) {
            // The pivot that failed, counted from 1, and whether the result is not finite.
            let flags = self.cleared::<i32>(2)?;
            let told = {
                let (a, sent, flags) = (a.pin()?, sent.pin()?, flags.pin()?);
                {
                    let gram = gram.buffer.pin_to_read()?;
                    let args = [a.arg(), gram.arg(), sent.arg(), (1.0 + damp).into(), (n as i32).into()];
                    self.blocks(&FACTOR, kernels.arrange, n, THREADS, 0, &args)?;
                }
                let answer = match work {
                    Some(work) => self.device().cholesky(a.at, n, work.pin()?.at)?,
                    None => self.cholesky(a.at, n, flags.at, real).map(|()| None)?,
                };
                let (unit, pivots, inverse) = (unit.buffer.pin()?, pivots.pin()?, inverse.pin()?);
                let args = [pivots.arg(), inverse.arg(), a.arg(), (n as i32).into()];
                self.each(&FACTOR, kernels.pivots_of, n, &args)?;
                let args = [unit.arg(), Arg::At(flags.at + 4), a.arg(), inverse.arg(), (n as i32).into()];
                self.blocks(&FACTOR, kernels.unit_of, n, THREADS, 0, &args)?;
                answer
            };
            diagonal = self.diagonal(gram)?;
            if diagonal.iter().any(|x| !x.is_finite()) {
                return Err(Error::NonFinite("the Hessian"));
            }
            let flags = self.fetch::<i32>(&flags, 2)?;
            if let Some(pivot) = told.or((flags[0] > 0).then(|| flags[0] as usize - 1)) {
                return Err(Error::NotPositive(pivot));
            }
            if flags[1] == 0 {
                break;
            }
            if work.is_none() {
                return Err(Error::NotPositive(0));
            }
        }
        let dead = diagonal.iter().filter(|x| **x <= 0.0).count();
        Ok(Factor { order, unit, pivots: self.fetch(&pivots, n)?, damp, dead })
    }

    /// Cholesky factor of the lower triangle of the `n × n` values at `a`, doubles or singles, in place.
    ///
    /// The first pivot that is not positive, counted from 1, goes to `failed`.
    fn cholesky(&self, a: u64, n: usize, failed: u64, real: Real) -> Result<()> {
        let (kernels, size) = (FactorKernels::of(real), real.bytes());
        let at = |row: usize, col: usize| a + (size * (row * n + col)) as u64;
        let (inverse, panel) = (self.buffer::<u8>(BLOCK * BLOCK * size)?, self.buffer::<u8>(n * BLOCK * size)?);
        let (inverse, panel) = (inverse.pin()?, panel.pin()?);
        for start in (0..n).step_by(BLOCK) {
            let side = BLOCK.min(n - start);
            let args = [
                Arg::At(a),
                inverse.arg(),
                Arg::At(failed),
                (start as i32).into(),
                (side as i32).into(),
                (n as i64).into(),
            ];
            self.blocks(&FACTOR, kernels.factor_block, 1, THREADS, 0, &args)?;
            let end = start + side;
            let rest = n - end;
            if rest == 0 {
                break;
            }
            let mut product = Product {
                real,
                shape: [rest, BLOCK, BLOCK],
                a: operand(at(end, start), n),
                b: transposed(inverse.at, BLOCK),
                c: operand(panel.at, BLOCK),
                alpha: 1.0,
                beta: 0.0,
            };
            self.device().product(&product)?;
            let args = [
                Arg::At(a),
                panel.arg(),
                (end as i32).into(),
                (start as i32).into(),
                (rest as i64).into(),
                (n as i64).into(),
            ];
            self.each(&FACTOR, kernels.place_panel, rest * BLOCK, &args)?;
            (product.alpha, product.beta) = (-1.0, 1.0);
            for col in (end..n).step_by(PANEL) {
                let from = panel.at + (size * (col - end) * BLOCK) as u64;
                product.shape = [n - col, PANEL.min(n - col), BLOCK];
                product.a = operand(from, BLOCK);
                product.b = transposed(from, BLOCK);
                product.c = operand(at(col, col), n);
                self.device().product(&product)?;
            }
        }
        Ok(())
    }
}
