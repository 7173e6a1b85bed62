//! Lists in a file that are refused before they are long.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// For `deserialize_with`: a list of at most `MAX`. What is a byte in a file may be
/// thousands in memory (structures of KVM may be cut short there), so a bound for
/// the file bounds nothing.
///
/// # Errors
/// It is longer, or one of its elements is wrong.
pub fn at_most<'de, const MAX: usize, T, D>(from: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    from.deserialize_seq(AtMost::<MAX, T>(PhantomData))
}

struct AtMost<const MAX: usize, T>(PhantomData<T>);

impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for AtMost<MAX, T> {
    type Value = Vec<T>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(element) = list.next_element()? {
            if all.len() >= MAX {
                return Err(A::Error::invalid_length(all.len() + 1, &self));
            }
            all.push(element);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, serde::Deserialize)]
    struct Three(#[serde(deserialize_with = "at_most::<3, _, _>")] Vec<u8>);

    fn read(bytes: &[u8]) -> Option<Three> {
        postcard::from_bytes(bytes).ok()
    }

    #[test]
    fn a_list_may_have_as_many_and_no_more() {
        assert_eq!(read(&[0]), Some(Three(vec![])));
        assert_eq!(read(&[3, 7, 8, 9]), Some(Three(vec![7, 8, 9])));
        assert_eq!(read(&[4, 7, 8, 9, 10]), None);
        assert_eq!(read(&[3, 7, 8]), None);
        assert_eq!(read(&[0xff, 0xff, 0xff, 0xff, 0x0f, 1, 2, 3, 4, 5]), None);
    }
}
