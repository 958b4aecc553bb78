import { Area, AreaChart, ResponsiveContainer, Tooltip, XAxis } from "recharts"

export function Chart({ data }: { data: { day: string; visits: number }[] }) {
  return (
    <ResponsiveContainer width="100%" height={160}>
      <AreaChart data={data}>
        <XAxis dataKey="day" />
        <Tooltip />
        <Area dataKey="visits" stroke="var(--color-primary)" fill="var(--color-primary)" fillOpacity={0.2} />
      </AreaChart>
    </ResponsiveContainer>
  )
}
