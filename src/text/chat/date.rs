//! A day that chat templates ask for, written as Python's `strftime` writes it.

/// A day of the Gregorian calendar.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Date {
    year: u16,
    /// From 1.
    month: u8,
    /// From 1.
    day: u8,
}

const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
/// From the one that begins the calendar's weeks of Python's `%w`.
const WEEK: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl Date {
    /// Of `YYYY-MM-DD`. Err: what is wrong with it.
    pub fn read(text: &str) -> Result<Date, String> {
        let wrong = || format!("{text:?} is no day, expected YYYY-MM-DD from 1000-01-01 on");
        let parts: Vec<&str> = text.split('-').collect();
        let [year, month, day] = parts[..] else { return Err(wrong()) };
        let number = |digits: &str, n: usize| match digits.len() == n && digits.bytes().all(|digit| digit.is_ascii_digit()) {
            true => digits.parse::<u16>().map_err(|_| wrong()),
            false => Err(wrong()),
        };
        let (year, month, day) = (number(year, 4)?, number(month, 2)? as u8, number(day, 2)? as u8);
        let is_day = year >= 1000 && (1..=12).contains(&month) && day >= 1 && day <= days_of(year, month);
        is_day.then_some(Date { year, month, day }).ok_or_else(wrong)
    }

    /// By a format of Python's. Err: what in the format is no part of a day.
    pub fn strftime(self, format: &str) -> Result<String, String> {
        let Date { year, month, day } = self;
        let (month_name, day_name) = (MONTHS[usize::from(month) - 1], WEEK[self.day_of_week()]);
        let (mut out, mut rest) = (String::new(), format.chars());
        while let Some(c) = rest.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive: String = rest.next().into_iter().collect();
            if directive == "-" {
                directive.extend(rest.next());
            }
            out.push_str(&match directive.as_str() {
                "Y" => year.to_string(),
                "y" => format!("{:02}", year % 100),
                "m" => format!("{month:02}"),
                "-m" => month.to_string(),
                "d" => format!("{day:02}"),
                "e" => format!("{day:2}"),
                "-d" => day.to_string(),
                "B" => month_name.into(),
                "b" | "h" => month_name[..3].into(),
                "A" => day_name.into(),
                "a" => day_name[..3].into(),
                "w" => self.day_of_week().to_string(),
                "j" => format!("{:03}", self.day_of_year()),
                "F" => self.to_string(),
                "D" => format!("{month:02}/{day:02}/{:02}", year % 100),
                "%" => "%".into(),
                other => return Err(format!("%{other}")),
            });
        }
        Ok(out)
    }

    /// From 1.
    fn day_of_year(self) -> u16 {
        (1..self.month).map(|month| u16::from(days_of(self.year, month))).sum::<u16>() + u16::from(self.day)
    }

    /// 0 is Sunday: days from 1 January of the year 1, a Monday, on.
    fn day_of_week(self) -> usize {
        let before = usize::from(self.year) - 1;
        (before * 365 + before / 4 - before / 100 + before / 400 + usize::from(self.day_of_year())) % 7
    }
}

fn days_of(year: u16, month: u8) -> u8 {
    let is_leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    match month {
        4 | 6 | 9 | 11 => 30,
        2 => 28 + u8::from(is_leap),
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Python 3.11's datetime writes them (C locale).
    #[test]
    fn days_as_python_writes_them() {
        let format = "%Y %y %m %-m %d %e %-d %B %b %h %A %a %w %j %F %D %%\u{e9}";
        let cases = [
            ("2026-11-26", "2026 26 11 11 26 26 26 November Nov Nov Thursday Thu 4 330 2026-11-26 11/26/26 %\u{e9}"),
            ("2024-02-29", "2024 24 02 2 29 29 29 February Feb Feb Thursday Thu 4 060 2024-02-29 02/29/24 %\u{e9}"),
            ("2000-12-31", "2000 00 12 12 31 31 31 December Dec Dec Sunday Sun 0 366 2000-12-31 12/31/00 %\u{e9}"),
            ("1900-03-01", "1900 00 03 3 01  1 1 March Mar Mar Thursday Thu 4 060 1900-03-01 03/01/00 %\u{e9}"),
        ];
        for (day, expected) in cases {
            assert_eq!(Date::read(day).unwrap().strftime(format).unwrap(), expected);
        }
        assert_eq!(Date::read("2026-11-26").unwrap().strftime("%d %H").unwrap_err(), "%H");
        assert_eq!(Date::read("2026-11-26").unwrap().strftime("%").unwrap_err(), "%");
        for wrong in
            ["", "2026-2-01", "2025-02-29", "1900-02-29", "2026-13-01", "2026-00-01", "2026-04-31", "2026-11-00", "+026-11-01", "20261126"]
        {
            assert!(Date::read(wrong).unwrap_err().contains("YYYY-MM-DD"), "{wrong}");
        }
    }
}
