//! What differs between processor architectures. x86_64 is the only one so far.

pub mod x86_64;
