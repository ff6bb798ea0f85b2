//! Numbers and strings in a payload.

/// A payload that breaks the format; says how.
#[derive(Debug)]
pub(super) struct Malformed(pub(super) &'static str);

/// Seven bits a byte, the lowest first; the top bit says that more follow.
pub(super) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A number that may be negative: 0, -1, 1, -2, 2 are written as 0, 1, 2, 3, 4.
pub(super) fn put_signed(out: &mut Vec<u8>, number: i64) {
    put(out, ((number << 1) ^ (number >> 63)) as u64);
}

/// Its length, and its bytes.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// What is left of a payload.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn byte(&mut self) -> Result<u8, Malformed> {
        Ok(self.bytes(1)?[0])
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Malformed("it is too short"))?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn number(&mut self) -> Result<u64, Malformed> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed("a number is larger than 64 bits"))
    }

    pub(super) fn signed(&mut self) -> Result<i64, Malformed> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// How many items follow, which take at least `least` bytes each: never more than can be there, so that what is
    /// reserved for them is bounded by what the file has.
    pub(super) fn count(&mut self, least: usize) -> Result<usize, Malformed> {
        let count = self.number()?;
        if count > (self.0.len() / least) as u64 {
            return Err(Malformed("it promises more items than it has room for"));
        }
        Ok(count as usize)
    }

    pub(super) fn text(&mut self) -> Result<String, Malformed> {
        let len = self.count(1)?;
        let text = std::str::from_utf8(self.bytes(len)?).map_err(|_| Malformed("a name is not UTF-8"))?;
        Ok(text.to_owned())
    }

    pub(super) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("it is too long")) }
    }
}
