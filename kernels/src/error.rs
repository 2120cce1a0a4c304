//! What can go wrong on a device.

/// Failure of a device operation. Callers add which tensor it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Matrices that do not fit each other: a mistake of the caller.
    #[error("{op}: expected {expected}, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shape it needs.
        expected: String,
        /// The shape it was given.
        found: String,
    },
    /// A NaN or infinity where only finite numbers make sense.
    #[error("{0} holds a NaN or an infinity")]
    NonFinite(&'static str),
    /// A matrix that should be positive definite is not, at this pivot.
    #[error("the Hessian is not positive definite at pivot {0}")]
    NotPositive(usize),
    /// The device, its driver or a library of it failed; one sentence that says what to do.
    #[error("{0}")]
    Device(String),
}
