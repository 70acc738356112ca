/** Columns of text for people. */

export type Alignment = 'left' | 'right';

/** Lines of `rows` under `heads`, columns two spaces apart, as wide as their widest cell. No trailing spaces. */
export function formatTable(
  columns: readonly { readonly head: string; readonly align: Alignment }[],
  rows: readonly (readonly string[])[],
): string {
  const all = [columns.map(({ head }) => head), ...rows];
  const widths = columns.map((_, column) => Math.max(...all.map((row) => width(row[column] ?? ''))));
  const lines = all.map((row) =>
    columns
      .map(({ align }, column) => {
        const cell = row[column] ?? '';
        const space = ' '.repeat((widths[column] ?? 0) - width(cell));
        return align === 'left' ? cell + space : space + cell;
      })
      .join('  ')
      .trimEnd(),
  );
  return `${lines.join('\n')}\n`;
}

/** Characters, not UTF-16 units. */
const width = (text: string): number => [...text].length;

/** Names come from images: control characters must not reach the terminal. */
export const printable = (text: string): string =>
  text.replaceAll(/\p{Cc}/gu, (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, '0')}`);
