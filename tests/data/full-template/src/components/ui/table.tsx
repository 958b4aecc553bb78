import { styled } from "@/lib/styled"

export const Table = styled("table", "w-full text-sm")
export const TableHead = styled("th", "p-2 text-left font-medium")
export const TableRow = styled("tr", "border-b")
export const TableCell = styled("td", "p-2")
