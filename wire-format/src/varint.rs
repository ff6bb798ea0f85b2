//! Numbers in as few bytes as they need: seven bits a byte, lowest first, the top bit set in all but the last (LEB128). What
//! may be negative is folded first: 0, -1, 1, -2, … become 0, 1, 2, 3, …

use crate::error::DecodeError;
use crate::frame::Fields;

/// Bytes that the longest number below 2^52 takes, a page's number or a distance between two of them, folded.
pub(crate) const MAX_PAGE_BYTES: usize = 8;

/// Appends a number.
pub(crate) fn put(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Reads a number.
///
/// # Errors
/// One that ends too soon, that has more than 64 bits, or that could be written in fewer bytes.
pub(crate) fn get(fields: &mut Fields<'_>) -> Result<u64, DecodeError> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = fields.bytes(1)?[0];
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits || byte == 0 && shift > 0 {
            return Err(DecodeError::Invalid("a number in more bytes than it needs"));
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(DecodeError::Invalid("a number in more bytes than it needs"))
}

/// Folds a signed number.
pub(crate) fn fold(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

/// Unfolds it.
pub(crate) fn unfold(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<u64, DecodeError> {
        let mut fields = Fields::new(bytes);
        let number = get(&mut fields)?;
        fields.end().map(|()| number)
    }

    proptest! {
        #[test]
        fn numbers_come_back(number: u64, bits in 0u32..64, signed: i64) {
            for number in [number >> bits, u64::MAX, 0, 0x7f, 0x80] {
                let mut bytes = Vec::new();
                put(number, &mut bytes);
                prop_assert_eq!(read(&bytes), Ok(number));
                prop_assert!(read(&bytes[..bytes.len() - 1]).is_err());
            }
            prop_assert_eq!(unfold(fold(signed)), signed);
        }

        #[test]
        fn there_is_one_way_to_write_each(bytes in proptest::collection::vec(any::<u8>(), 1..12)) {
            if let Ok(number) = read(&bytes) {
                let mut again = Vec::new();
                put(number, &mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn distances_of_pages_take_eight_bytes_at_most() {
        let mut bytes = Vec::new();
        put(fold(-(1 << 52)), &mut bytes);
        assert_eq!(bytes.len(), MAX_PAGE_BYTES);
        assert_eq!([fold(0), fold(-1), fold(1), fold(-2)], [0, 1, 2, 3]);
    }
}
